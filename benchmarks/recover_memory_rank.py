"""One rank of `benchmarks/recover_memory.py`: trains, and says the most memory that it ever had.

Run as a file, with the checkout that is measured on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

_EVERY = 0.005  # seconds between two looks


class Peak:
    """The largest anonymous memory of this process: what no file can give back."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Bytes at the worst moment so far."""
        self._ended.set()
        self._thread.join()
        return self.bytes

    def _look(self) -> None:
        while not self._ended.wait(_EVERY):
            self.bytes = max(self.bytes, anonymous())


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) << 10


def main() -> None:
    """`JOB RANK PORT`: the job is a JSON file; the result lies beside it."""
    import deepspeed  # noqa: F401  # not counted, like all that is imported
    import torch
    from transformers import MixtralForCausalLM  # noqa: F401  # the same

    from cluster.expert_parallel import Place, join
    from stages.recover.config import RecoverConfig
    from stages.recover.ranks import Ranks
    from stages.recover.stage import TrainUnit, run_train
    from stages.recover.trainer import Loop

    path, rank, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    job = json.loads(path.read_text())
    torch.set_num_threads(1)
    config, student = RecoverConfig(**job["config"]), Path(job["student"])
    group = join(Place(rank, config.ranks, "127.0.0.1", port))
    files = sorted(student.glob("*.safetensors"))
    folder = path.parent / "written"
    unit = TrainUnit(
        student=student,
        needs_code=False,
        corpus=Path(job["corpus"]),
        taught=(),
        config=config,
        files=tuple((file.name, folder / file.name) for file in files),
        folder=path.parent / "states",
        inputs=(),
    )
    idle, peak = anonymous(), Peak()
    opened: list[int] = []
    begin = Loop.__init__

    def begun(loop: Loop, *given: Any) -> None:
        begin(loop, *given)
        opened.append(peak.bytes)

    Loop.__init__ = begun  # type: ignore[method-assign, assignment]  # both versions have it
    run_train(unit, Ranks(group))
    found = {"open_bytes": opened[0] - idle, "peak_bytes": peak.stop() - idle}
    path.with_name(f"rank-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # gloo's threads may abort a process that ends in an orderly way


if __name__ == "__main__":
    main()
