"""Real ranks for tests: processes that join one gloo group and each run the same function.

`python -m tests.cluster.ranks FUNCTION RANK SIZE PORT FOLDER` is one of them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(
    function: str, folder: Path, size: int = 2, *, path: str | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a function of this module on all ranks and waits; a hang ends after two minutes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PATH": path} if path else {})
    commands = [
        [sys.executable, "-m", __name__, function, str(rank), str(size), str(port), str(folder)]
        for rank in range(size)
    ]
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipe) for command in commands
    ]
    try:
        outs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out)
        for process, out in zip(started, outs, strict=True)
    ]


def families(folder: Path, group: Any) -> None:
    """Everything that is compared with one process, for every checkpoint in the folder."""
    import torch

    from models.moe import MoeCheckpoint
    from stages.calibrate.parallel import Rank, check_layers, load_rank
    from stages.errors import ReplicaError
    from tests.cluster.shards import unit_of
    from tests.tiny import logits_of, random_ids

    for model_folder in sorted(folder.glob("model-*")):
        moe = MoeCheckpoint.open(model_folder)
        model = load_rank(model_folder, "auto", group)
        found: dict[str, Any] = {
            # Another number of tokens on every rank.
            "logits": logits_of(model, random_ids(1 + group.rank, 7 + 4 * group.rank, group.rank)),
            "experts": model.model.layers[moe.layers[0]].mlp.experts.local.down_proj.shape[0],
        }
        half = load_rank(model_folder, "bfloat16", group)
        found["half"] = logits_of(half, random_ids(2, 9, group.rank))
        rank = Rank(group)
        unit = unit_of(model_folder, folder)
        first, second = rank.run(unit), rank.run(unit)
        found["first"], found["second"] = first, second
        if group.rank == 1:
            model.model.layers[moe.layers[0]].mlp.experts.local.down_proj *= 1.5
        try:
            check_layers(moe, model, group)
        except ReplicaError as error:
            found["refused"] = str(error)
        torch.save(found, folder / f"{model_folder.name}-{group.rank}.pt")


def lose_a_peer(folder: Path, group: Any) -> None:
    """Rank 1 dies; rank 0 says what it saw."""
    from cluster.errors import LostPeer

    assert group.agree(group.rank == 0)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        group.gather(group.rank)
        group.agree(True)
    except LostPeer as error:
        (folder / "seen").write_text(str(error))


def join_only(folder: Path, group: Any) -> None:
    """The group stands and carries a word."""
    assert group.agree(group.rank == 0)


def main() -> None:
    """Joins and runs."""
    import torch

    from cluster.expert_parallel import Place, join

    function, rank, size, port, folder = sys.argv[1:]
    torch.set_num_threads(1)
    group = join(Place(int(rank), int(size), "127.0.0.1", int(port)))
    globals()[function](Path(folder), group)
    # gloo's threads may abort a process that ends in an orderly way after its peer died.
    os._exit(0)


if __name__ == "__main__":
    main()
