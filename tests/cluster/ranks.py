"""Real ranks for tests: processes that join one gloo group and each run the same function.

`python -m tests.cluster.ranks FUNCTION RANK SIZE PORT FOLDER` is one of them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(
    function: str,
    folder: Path,
    size: int = 2,
    *,
    path: str | None = None,
    module: str = __name__,
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a function of a module on all ranks and waits; a hang ends after two minutes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PATH": path} if path else {})
    commands = [
        [sys.executable, "-m", module, function, str(rank), str(size), str(port), str(folder)]
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


CASES = [(dtype, engine) for dtype in ("auto", "bfloat16") for engine in ("resident", "streaming")]


def case_folder(dtype: str, engine: str) -> str:
    """Where the shards of a case are written."""
    return f"{dtype}-{engine}"


def shards(folder: Path, group: Any) -> None:
    """Observes the shards with every checkpoint in the folder, in every type, by both engines."""
    _shards(folder, group, CASES)


def diagonal(folder: Path, group: Any) -> None:
    """Both types and both engines, each once."""
    _shards(folder, group, CASES[:: len(CASES) - 1])


def _shards(folder: Path, group: Any, cases: list[tuple[str, str]]) -> None:
    from tests.cluster.shards import units_of

    for model in sorted(folder.glob("model-*")):
        for dtype, engine in cases:
            output = case_folder(dtype, engine)
            units = units_of(model, folder, output=output, dtype=dtype, engine=engine)
            found = run_bundles(units, group), run_bundles(units, group)
            torch_save(found, folder / f"{model.name}-{output}-{group.rank}.pt")


def run_bundles(units: Any, group: Any) -> list[Any]:
    """What this rank returns for one bundle after the other."""
    from stages.calibrate.parallel import Rank

    rank, starts = Rank(group), range(0, len(units), group.size)
    return [rank.run(units[start : start + group.size]) for start in starts]


def logits(folder: Path, group: Any) -> None:
    """Logits, expert choices and shares of every checkpoint in the folder."""
    from models.blocks import find_blocks
    from stages.calibrate.distributed import check_blocks, open_rank
    from stages.errors import ReplicaError
    from tests.cluster.counting import Counting
    from tests.tiny import logits_of, random_ids

    for model_folder in sorted(folder.glob("model-*")):
        rank = open_rank(model_folder, "auto", "resident", "thin", group)
        blocks = find_blocks(rank.model)
        counting = Counting(rank.model)
        # Another number of tokens on every rank.
        ids = random_ids(1 + group.rank, 7 + 4 * group.rank, group.rank)
        found: dict[str, Any] = {}
        with counting as found["counts"]:
            found["logits"] = logits_of(rank.model, ids)
        own = next(iter(blocks.values())).experts
        found["held"] = {name: len(tensor) for name, tensor in own.named_parameters()}
        if group.rank == 1:
            for tensor in own.parameters():
                tensor.data.mul_(1.5)
        try:
            check_blocks(rank, whole_of(model_folder), group)
        except ReplicaError as error:
            found["refused"] = str(error)
        torch_save(found, folder / f"{model_folder.name}-logits-{group.rank}.pt")


_PATTERN: dict[str, Any] = {
    "moe_layer_pattern": r"model\.layers\.\d+\.mlp$",
    "router_pattern": "router",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    "num_experts_attr": "num_local_experts",
    "top_k_attr": "num_experts_per_tok",
}
# Families that AutoEP has no preset for, described to it as its manual says.
PATTERNS = {"GptOss": _PATTERN | {"expert_activation": "swiglu_oai"}, "Phimoe": _PATTERN}


def autoep(folder: Path, group: Any) -> None:
    """Every checkpoint in the folder behind AutoEP: logits and a shard, or why not."""
    from stages.calibrate.autoep import open_layers
    from stages.calibrate.distributed import check_blocks
    from stages.errors import ReplicaError
    from tests.tiny import logits_of, random_ids

    for model_folder in sorted(folder.glob("model-*")):
        family = model_folder.name.removeprefix("model-")
        ids = random_ids(1 + group.rank, 7 + 4 * group.rank, group.rank)
        found: dict[str, Any] = {}
        try:
            rank = open_layers(model_folder, "auto", group, **PATTERNS.get(family, {}))
            check_blocks(rank, whole_of(model_folder), group)
            found["logits"] = logits_of(rank.model, ids)
            found["shard"] = autoep_shard(model_folder, folder, group)
        except ReplicaError as error:
            found["refused"] = str(error)
        torch_save(found, folder / f"{model_folder.name}-autoep-{group.rank}.pt")


def autoep_shard(model: Path, folder: Path, group: Any) -> Any:
    """One shard per rank."""
    from dataclasses import replace

    from stages.calibrate.parallel import Rank
    from tests.cluster.shards import units_of

    units = units_of(model, folder, shards=2, output="autoep")
    return Rank(group, "autoep").run([replace(unit, num_experts=4) for unit in units])


def whole_of(folder: Path) -> Any:
    """Layers with all their experts."""
    from models.streaming.model import open_streamed

    return open_streamed(folder, "auto", layers_only=True)


def torch_save(found: Any, path: Path) -> None:
    """For `torch.load`."""
    import torch

    torch.save(found, path)


def lose_a_peer(folder: Path, group: Any) -> None:
    """Rank 1 dies; rank 0 says what it saw."""
    from cluster.errors import LostPeer

    assert group.largest(group.rank) == group.size - 1
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        group.largest(0)
        group.largest(0)
    except LostPeer as error:
        (folder / "seen").write_text(str(error))


class _Twice:
    """Experts that all double."""

    def __call__(self, rows: Any, _ids: Any, _gates: Any) -> Any:
        return 2 * rows


def join_only(folder: Path, group: Any) -> None:
    """The group stands and carries a number, and rows, of which a rank may have none."""
    import torch

    from cluster.expert_parallel import exchange

    assert group.largest(group.rank) == group.size - 1
    tokens = 3 * group.rank
    hidden = torch.arange(tokens * 4.0).view(tokens, 4)
    ids = torch.tensor([0, 3]).repeat(tokens, 1)
    twice: Any = _Twice()
    found = exchange(twice, hidden, ids, 4, group)
    assert found.equal(2 * hidden.unsqueeze(1).expand(tokens, 2, 4))


def main(functions: Mapping[str, Any]) -> None:
    """Joins and runs; `functions` by name."""
    import torch

    from cluster.expert_parallel import Place, join

    function, rank, size, port, folder = sys.argv[1:]
    torch.set_num_threads(1)
    group = join(Place(int(rank), int(size), "127.0.0.1", int(port)))
    functions[function](Path(folder), group)
    # gloo's threads may abort a process that ends in an orderly way after its peer died.
    os._exit(0)


if __name__ == "__main__":
    main(globals())
