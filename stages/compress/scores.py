"""The per-layer job before a global threshold: what every row of every S is worth.

It does what the layer's transform will do (merge, narrow) up to a refit, decomposes the experts,
and keeps nothing but one small table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.arrow import read_table, write_table
from models.expert import Expert
from models.expert_function import activation
from models.factored import Factored
from stages.compress.config import CompressConfig
from stages.compress.factor import Measured, measured, shape_of
from stages.compress.layer import Seen, in_turn, names
from stages.compress.threshold import Array, Curve
from stages.errors import StatisticsError
from stages.refit.config import RefitConfig
from stages.refit.usage import usage
from stages.transform.stage import TransformUnit, merge_layer, reduce_layer, sampled
from stages.unit import Fingerprint, OneFile

SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("matrix", pa.string()),
        # Bytes of one row of S in every expert of the layer, and of its index.
        ("row_bytes", pa.int64()),
        # Rows that `threshold: layer` keeps.
        ("even", pa.int32()),
        # Worth of the n-th strongest row of every expert, added up; share of the whole matrix.
        ("gains", pa.list_(pa.float64())),
    ]
)
_INDEX_BYTES = 8


@dataclass(frozen=True)
class ScoresUnit(OneFile):
    """One layer; `transform` is what will write it."""

    transform: TransformUnit
    output: Path

    @property
    def name(self) -> str:
        """`threshold/layer-00003`."""
        return f"threshold/{self.output.stem}"

    @property
    def near(self) -> str | None:
        """The weight file that it reads most of."""
        return self.transform.near

    @property
    def fingerprint(self) -> Fingerprint:
        """Everything that shapes the layer."""
        return {"code": "threshold-1", "layer": self.transform.fingerprint}


def plan(units: Sequence[TransformUnit], folder: Path) -> list[ScoresUnit]:
    """One unit per layer that is decomposed; nothing is refitted in it."""
    off = RefitConfig(enabled=False)
    return [
        ScoresUnit(replace(unit, refit=off, carried=None), folder / f"layer-{unit.layer:05d}.arrow")
        for unit in units
        if unit.decomposes is not None
    ]


def run_one(unit: ScoresUnit) -> dict[str, Any]:
    """Writes one row per matrix.

    Raises:
        StatisticsError: a score is not finite.
    """
    transform, decision = unit.transform, unit.transform.decision
    config = transform.decomposes
    assert decision is not None and config is not None
    experts, routers, _ = merge_layer(transform, decision)
    if transform.needs_inputs:
        experts = reduce_layer(transform, decision, experts, routers).experts
    seen = None
    if config.needs_inputs:
        sample = sampled(transform, decision, experts, routers)
        use = usage(sample.ids, sample.gates, len(experts))
        act = activation(transform.moe.checkpoint.config)
        seen = Seen(sample.inputs.hidden.float(), use, act)
    found = curves(experts, config, decision.layer, seen)
    if not all(np.isfinite(curve.gains).all() for curve in found):
        raise StatisticsError(
            f"{unit.name} found scores that are not finite",
            "check the original tensors: `coalesce validate CONFIG --deep`",
        )
    write_table(unit.output, pa.Table.from_pylist([_row(each) for each in found], schema=SCHEMA))
    return {"worth": {each.matrix: float(each.gains.sum()) for each in found}}


@torch.inference_mode()
def curves(
    experts: Sequence[Expert], config: CompressConfig, layer: int, seen: Seen | None
) -> list[Curve]:
    """One curve per matrix of a layer.

    By activations, an expert that no sampled token goes to is worth nothing.
    """
    scores: dict[str, list[Measured]] = {name: [] for name in names(experts[0])}

    def one(weight: Tensor, name: str, inputs: Tensor | None) -> Factored:
        found = measured(weight, config, inputs)
        idle = config.importance == "activations" and inputs is not None and not len(inputs)
        nothing = replace(found, scores=torch.zeros_like(found.scores), energy=0.0)
        scores[name].append(nothing if idle else found)
        return found.factored

    for number, expert in enumerate(experts):
        if seen is None:
            for name in names(expert):
                one(getattr(expert, name), name, None)
        else:
            in_turn(expert, seen, seen.use[number], one)
    return [_curve(layer, name, each, experts, config) for name, each in scores.items()]


def _curve(
    layer: int,
    name: str,
    found: Sequence[Measured],
    experts: Sequence[Expert],
    config: CompressConfig,
) -> Curve:
    weight = getattr(experts[0], name)
    shape = shape_of(config, *weight.shape)
    across = shape.width if config.axis == "rows" else shape.height
    total = torch.stack([each.scores.double().sort(descending=True).values for each in found])
    energy = sum(each.energy for each in found)
    gains: Array = (total.sum(dim=0) / max(energy, 1e-300)).cpu().numpy()
    each = across * weight.element_size() + _INDEX_BYTES
    return Curve(layer, name, gains, len(experts) * each, shape.kept)


def _row(curve: Curve) -> dict[str, Any]:
    return vars(curve) | {"gains": curve.gains.tolist()}


def read_curves(path: Path) -> list[Curve]:
    """The inverse of what `run_one` writes.

    Raises:
        StatisticsError: no such table.
    """
    try:
        rows = read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise StatisticsError(
            f"cannot read the scores of S from {path}: {error}", "remove it and run again"
        ) from error
    return [Curve(**row | {"gains": np.asarray(row["gains"], dtype=float)}) for row in rows]
