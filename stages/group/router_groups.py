"""Layers whose router first chooses among groups of experts, decided group by group.

DeepSeek-V2, DeepSeek-V3 and GLM-4.5 divide the experts of a layer into groups of neighbours. A
checkpoint with fewer experts keeps that structure if every group keeps the same number.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.calibrate.statistics import LayerStatistics
from stages.group.decision import LayerDecision, from_labels
from stages.group.part import part


def split(statistics: LayerStatistics, groups: int) -> list[LayerStatistics]:
    """The groups of one layer as layers; group g of layer l is layer l * groups + g."""
    size = statistics.num_experts // groups
    return [
        part(
            statistics,
            range(group * size, (group + 1) * size),
            layer=statistics.layer * groups + group,
        )
        for group in range(groups)
    ]


def join(
    decisions: Sequence[LayerDecision], statistics: Sequence[LayerStatistics], groups: int
) -> list[LayerDecision]:
    """The inverse of `split`: one decision per layer; weights are those within each group."""
    by_part = {decision.layer: decision for decision in decisions}
    found = []
    for each in statistics:
        labels: list[int | None] = []
        weight: list[float] = []
        for group in range(groups):
            inner, start = by_part[each.layer * groups + group], len(labels)
            labels += [None if g is None else inner.representatives[g] + start for g in inner.group]
            weight += inner.weight
        found.append(from_labels(each.layer, labels, weight))
    return found
