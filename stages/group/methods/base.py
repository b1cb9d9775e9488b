"""What every deciding method is: statistics of the merged layers in, decisions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.budget import by_rank
from stages.group.decision import LayerDecision, from_labels


class Decide(Protocol):
    """A pure function; `total` is the number of experts to keep over all given layers."""

    def __call__(
        self,
        config: Any,
        statistics: Sequence[LayerStatistics],
        total: int,
    ) -> list[LayerDecision]: ...


def keep_best(
    statistics: LayerStatistics, score: np.ndarray[Any, Any], count: int
) -> LayerDecision:
    """Plain pruning: the `count` highest scores stay as they are, the others are dropped."""
    kept = {int(expert) for expert in by_rank(score)[:count]}
    labels = [expert if expert in kept else None for expert in range(len(score))]
    return from_labels(statistics.layer, labels, statistics.frequency.tolist())


def keep_all(statistics: LayerStatistics) -> LayerDecision:
    """Every expert its own group."""
    ids = list(range(statistics.num_experts))
    return from_labels(statistics.layer, ids, statistics.frequency.tolist())
