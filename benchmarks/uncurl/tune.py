"""Training after a reduction, as the paper has it: the routers alone, then everything.

By the product's recover stage, without a teacher: cross-entropy on the task's training text.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor, nn

from benchmarks.uncurl.setup import Tuning
from models.arrow import write_table
from stages.recover.api import recover
from stages.recover.config import RecoverConfig

BATCH = 16
# A folder to losses per task.
Measure = Callable[[Path], dict[str, float]]


@torch.inference_mode()
def mean_loss(model: Any, rows: Tensor) -> float:
    """Mean cross-entropy in nats per token of windows [W, S + 1]."""
    total = 0.0
    for batch in torch.split(rows, BATCH):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        targets = batch[:, 1:].flatten()
        total += float(
            nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
        )
    return total / rows[:, 1:].numel()


def write_corpus(path: Path, domain: str, rows: Tensor) -> None:
    """Windows [W, S + 1] as the blocks of a corpus file."""
    blocks = pa.array(rows.tolist(), pa.list_(pa.int32()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, pa.table({"domain": pa.array([domain] * len(rows)), "tokens": blocks}))


def config_of(tuning: Tuning, mode: Literal["router", "full"], steps: int) -> RecoverConfig:
    """One stage; its rate rises for a tenth of the steps and falls to zero in a line."""
    rate = tuning.router_rate if mode == "router" else tuning.full_rate
    return RecoverConfig(
        mode=mode,
        alpha=0.0,
        steps=steps,
        batch=tuning.batch,
        micro_batch=tuning.batch,
        learning_rate=rate,
        schedule="linear",
        warmup=steps // 10,
    )


def two_stages(
    model: Path, corpus: Path, tuning: Tuning, measure: Measure, work: Path
) -> dict[str, dict[str, float]]:
    """Losses before, after the routers' stage, and after all; `model` is left as it is."""
    found = {"before": measure(model)}
    routers, everything = work / "routers", work / "everything"
    recover(model, routers, config_of(tuning, "router", tuning.router_steps), corpus)
    found["routers"] = measure(routers)
    recover(routers, everything, config_of(tuning, "full", tuning.full_steps), corpus)
    found["tuned"] = measure(everything)
    shutil.rmtree(work)
    return found


def routers_alone(
    model: Path,
    corpus: Path,
    tuning: Tuning,
    marks: Sequence[int],
    measure: Measure,
    work: Path,
) -> dict[str, dict[str, float]]:
    """Losses after training the routers for each number of steps, every time from the start."""
    found = {}
    for steps in marks:
        if steps:
            recover(model, work / str(steps), config_of(tuning, "router", steps), corpus)
        found[str(steps)] = measure(work / str(steps) if steps else model)
    shutil.rmtree(work, ignore_errors=True)
    return found
