"""What observing costs: tokens per second of a plain forward pass and of an observed one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import show, wants_quick
from stages.calibrate.recorder import Recorder
from stages.calibrate.resident import observe_batch
from stages.corpus.blocks import Batch, Block
from stages.model import batch_of, load_model, pad_id

MODEL = Path(__file__).resolve().parents[1] / "examples" / "bundled" / "model"


def rate(work: Callable[[], None], tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second: minimum, median and maximum over repeats, after one warm-up."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        rates.append(tokens / (time.perf_counter() - start))
    return {"min": min(rates), "median": statistics.median(rates), "max": max(rates)}


def main() -> None:
    """Alternates both on the same random batch."""
    repeats = 3 if wants_quick(str(__doc__)) else 15
    model = load_model(MODEL, "float32")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (16, 256), generator=generator)
    batch = Batch(0, tuple(Block("any", tuple(row)) for row in ids.tolist()))
    experts = model.config.num_local_experts
    recorder = Recorder(experts)

    def plain() -> None:
        inputs, mask = batch_of(batch.rows, pad_id(model), model.device)
        with torch.inference_mode():
            model.model(input_ids=inputs, attention_mask=mask, use_cache=False)

    def observed() -> None:
        observe_batch(model, batch, recorder)

    rows: list[dict[str, Any]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, work in (("plain", plain), ("observed", observed)):
            rows.append({"forward": name, "threads": threads} | rate(work, ids.numel(), repeats))
    show("observer: tokens per second", rows)


if __name__ == "__main__":
    main()
