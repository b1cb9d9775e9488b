"""Layers whose router first chooses among groups of experts, decided group by group.

DeepSeek-V2, DeepSeek-V3 and GLM-4.5 divide the experts of a layer into groups of neighbours. A
checkpoint with fewer experts keeps that structure if every group keeps the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.calibrate.observer import VECTORS
from stages.calibrate.statistics import LayerStatistics
from stages.group.decision import LayerDecision, from_labels


def split(statistics: LayerStatistics, groups: int) -> list[LayerStatistics]:
    """The groups of one layer as layers; group g of layer l is layer l * groups + g."""
    size = statistics.num_experts // groups
    return [
        LayerStatistics(
            statistics.layer * groups + group,
            {
                name: _entries(name, values, slice(group * size, (group + 1) * size))
                for name, values in statistics.sums.items()
            },
        )
        for group in range(groups)
    ]


def join(
    decisions: Sequence[LayerDecision], statistics: Sequence[LayerStatistics], groups: int
) -> list[LayerDecision]:
    """The inverse of `split`: one decision per layer; weights are shares of the whole layer."""
    by_part = {decision.layer: decision for decision in decisions}
    found = []
    for each in statistics:
        labels: list[int | None] = []
        for group in range(groups):
            part, start = by_part[each.layer * groups + group], len(labels)
            labels += [None if g is None else part.representatives[g] + start for g in part.group]
        found.append(from_labels(each.layer, labels, each.frequency.tolist()))
    return found


def _entries(name: str, values: np.ndarray[Any, Any], part: slice) -> np.ndarray[Any, Any]:
    """Rows of some experts, and where columns are experts too, their columns."""
    return values[part, part] if name in VECTORS else values[part]
