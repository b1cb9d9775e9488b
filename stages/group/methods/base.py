"""What every deciding method is: statistics of the merged layers in, decisions out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.errors import BudgetError
from stages.group.budget import by_rank, uniform
from stages.group.decision import LayerDecision, from_labels
from stages.group.part import part, with_protected

Array = np.ndarray[Any, Any]
# Decides one layer with E experts that keeps 1 <= K < E of them.
DecideLayer = Callable[[LayerStatistics, int], LayerDecision]


class Decide(Protocol):
    """A pure function; `total` is the number of experts to keep over all given layers."""

    def __call__(
        self,
        config: Any,
        statistics: Sequence[LayerStatistics],
        total: int,
    ) -> list[LayerDecision]: ...


def evenly(
    statistics: Sequence[LayerStatistics], total: int, decide_layer: DecideLayer
) -> list[LayerDecision]:
    """The same number of experts in every layer."""
    layers = [each.layer for each in statistics]
    return each_layer(statistics, uniform(total, layers, statistics[0].num_experts), decide_layer)


def each_layer(
    statistics: Sequence[LayerStatistics], kept: Mapping[int, int], decide_layer: DecideLayer
) -> list[LayerDecision]:
    """Every layer by itself. Protected experts take their places first; the others get the rest.

    Raises:
        BudgetError: no place is left for the experts that are not protected.
    """
    return [_decide_layer(each, kept[each.layer], decide_layer) for each in statistics]


def _decide_layer(
    statistics: LayerStatistics, kept: int, decide_layer: DecideLayer
) -> LayerDecision:
    if kept >= statistics.num_experts:
        return keep_all(statistics)
    if not statistics.protected:
        return decide_layer(statistics, kept)
    left = kept - len(statistics.protected)
    if left < 1:
        raise BudgetError(
            f"layer {statistics.layer} keeps {kept} experts, {len(statistics.protected)} of its"
            " experts are super experts that stay as they are",
            "raise the budget, or set group.protect_super_experts=false",
        )
    protected = set(statistics.protected)
    others = [e for e in range(statistics.num_experts) if e not in protected]
    return with_protected(statistics, decide_layer(part(statistics, others), left), others)


def keep_best(statistics: LayerStatistics, score: Array, count: int) -> LayerDecision:
    """Plain pruning: the `count` highest scores stay as they are, the others are dropped."""
    return keep_only(statistics, by_rank(score)[:count].tolist())


def keep_only(statistics: LayerStatistics, kept: Sequence[int]) -> LayerDecision:
    """These experts stay as they are, the others are dropped."""
    chosen = set(kept)
    labels = [e if e in chosen else None for e in range(statistics.num_experts)]
    return from_labels(statistics.layer, labels, statistics.frequency.tolist())


def keep_all(statistics: LayerStatistics) -> LayerDecision:
    """Every expert its own group."""
    return keep_only(statistics, range(statistics.num_experts))


def nearest_centre(statistics: LayerStatistics, centres: Array, similarity: Array) -> LayerDecision:
    """Every expert joins the centre that is most similar to it; ties go to the lower id.

    Args:
        centres: ids.
        similarity: [E, E], only the columns of centres are read.
    """
    ordered = np.sort(centres)
    nearest = ordered[np.argmax(similarity[:, ordered], axis=1)]
    nearest[ordered] = ordered
    return from_labels(statistics.layer, nearest.tolist(), statistics.frequency.tolist())


def merge_clusters(statistics: LayerStatistics, labels: Array) -> LayerDecision:
    """Merges the experts of each cluster around the most frequent; ties go to the lower id.

    Args:
        labels: [E], any names of clusters.
    """
    representative: list[int | None] = [None] * len(labels)
    for cluster in np.unique(labels):
        members = np.flatnonzero(labels == cluster)
        chosen = int(members[np.argmax(statistics.frequency[members])])
        for expert in members:
            representative[expert] = chosen
    return from_labels(statistics.layer, representative, statistics.frequency.tolist())
