"""The per-layer job that evaluates all experts on the sampled tokens and adds up what they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.arrow import write_table
from models.expert_function import check_function
from models.moe import MoeCheckpoint
from stages.calibrate.sample import hashes, shares
from stages.inputs.read import LayerInputs
from stages.inputs.stage import InputsUnit
from stages.subsample.columns import to_table
from stages.subsample.evaluate import layer_sums
from stages.unit import Done, Fingerprint, OneFile, execute, read_digests

VERSION = 2
# Enough to tell one function from another.
_COMPARED = 16


@dataclass(frozen=True)
class SubsampleUnit(OneFile):
    """One layer: its sampled inputs, and its experts straight from the checkpoint."""

    moe: MoeCheckpoint
    layer: int
    inputs: Path
    upstream: str  # digest of the inputs
    model: str  # fingerprint
    threads: int
    output: Path
    most: int | None = None  # tokens; None: all

    @property
    def name(self) -> str:
        """`subsample/layer-00003`."""
        return f"subsample/layer-{self.layer:05d}"

    @property
    def near(self) -> str | None:
        """The weight file that it reads most of."""
        return self.moe.home(self.layer)

    @property
    def fingerprint(self) -> Fingerprint:
        """Model, sampled inputs, and what changes the arithmetic."""
        return {
            "code": f"subsample-{VERSION}",
            "model": self.model,
            "layer": self.layer,
            "upstream": self.upstream,
            "threads": self.threads,
            "most": self.most,
        }


def plan(
    inputs: Sequence[InputsUnit],
    moe: MoeCheckpoint,
    *,
    model: str,
    threads: int,
    folder: Path,
    most: int | None = None,
) -> list[SubsampleUnit]:
    """One unit per layer, once its inputs are joined; each evaluates `most` tokens at most."""
    return [
        SubsampleUnit(
            moe=moe,
            layer=unit.layer,
            inputs=unit.output,
            upstream=read_digests(unit.marker),
            model=model,
            threads=threads,
            output=folder / file_name(unit.layer),
            most=most,
        )
        for unit in inputs
    ]


def file_name(layer: int) -> str:
    """`layer-00003.arrow`."""
    return f"layer-{layer:05d}.arrow"


def run_one(unit: SubsampleUnit) -> dict[str, Any]:
    """Writes the layer's table (schema: docs/statistics.md).

    Raises:
        CheckpointError: the experts compute a function that is not known here.
        StatisticsError: the inputs cannot be read.
    """
    inputs = LayerInputs.read(unit.inputs)
    if unit.most is not None and unit.most < len(inputs):
        inputs = inputs.only(smaller(inputs, unit.most))
    check_function(unit.moe, unit.layer, inputs.hidden[:_COMPARED])
    sums = layer_sums(unit.moe, inputs, unit.output)
    metadata = {"model": unit.model, "seed": str(inputs.seed)} | inputs.inputs
    write_table(unit.output, to_table(unit.layer, sums, dict(sorted(metadata.items()))))
    return {"tokens": len(inputs), "bytes": unit.output.stat().st_size}


def smaller(inputs: LayerInputs, tokens: int) -> Tensor:
    """[N] bool: those that a sample of so many tokens of the same text would have."""
    blocks, positions = inputs.block.numpy(), inputs.position.numpy().astype(np.int64)
    order = hashes(blocks, positions, inputs.seed)
    domains = inputs.domain.numpy()
    present = [int((domains == code).sum()) for code in range(len(inputs.domains))]
    kept = np.zeros(len(inputs), bool)
    for code, share in enumerate(shares(present, tokens)):
        rows = np.flatnonzero(domains == code)
        kept[rows[np.argsort(order[rows], kind="stable")[:share]]] = True
    return torch.from_numpy(kept)


def make_worker() -> Callable[[SubsampleUnit], Done]:
    """A worker for `cluster.executor.Job`."""
    return _execute


def _execute(unit: SubsampleUnit) -> Done:
    return execute(unit, run_one)
