"""Some experts of a layer as a layer of their own, and back: for groups and protected experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stages.calibrate.observer import VECTORS, Sums
from stages.calibrate.statistics import LayerStatistics
from stages.group.decision import LayerDecision, from_labels
from stages.subsample.columns import PAIRS


def part(
    statistics: LayerStatistics, experts: Sequence[int], layer: int | None = None
) -> LayerStatistics:
    """Statistics of some experts only, renumbered in the order given; everything that is attached.

    Tokens stay those of the whole layer.

    Args:
        experts: ids within the layer.
        layer: another number for the part, e.g. where one layer becomes several.
    """
    ids = np.asarray(experts, dtype=np.int64)
    subsample, router, weights = statistics.subsample, statistics.router, statistics.weights
    position = {int(expert): index for index, expert in enumerate(ids)}
    return replace(
        statistics,
        layer=statistics.layer if layer is None else layer,
        sums=_rows(statistics.sums, ids),
        subsample=None if subsample is None else _rows(subsample, ids),
        router=None if router is None else router[ids],
        weights=None if weights is None else weights[np.ix_(ids, ids)],
        protected=tuple(position[e] for e in statistics.protected if e in position),
    )


def with_protected(
    statistics: LayerStatistics, decision: LayerDecision, experts: Sequence[int]
) -> LayerDecision:
    """The whole layer: `decision` on `experts`, every other expert alone in its group."""
    labels: list[int | None] = list(range(statistics.num_experts))
    weight = statistics.frequency.tolist()
    for index, expert in enumerate(experts):
        group = decision.group[index]
        labels[expert] = None if group is None else experts[decision.representatives[group]]
        weight[expert] = decision.weight[index]
    return from_labels(statistics.layer, labels, weight)


def _rows(sums: Sums, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Sums:
    """Rows of some experts, and where columns are experts too, their columns."""
    pairs = {*VECTORS, *PAIRS}
    return {
        name: values[np.ix_(ids, ids)] if name in pairs else values[ids]
        for name, values in sums.items()
    }
