"""REAP pruning (arXiv 2510.13999): router-weighted expert activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.budget import uniform
from stages.group.config import Reap
from stages.group.decision import LayerDecision
from stages.group.methods.base import keep_best


def decide(config: Reap, statistics: Sequence[LayerStatistics], total: int) -> list[LayerDecision]:
    """The same number of experts in every layer; see `base.Decide`."""
    kept = uniform(total, [each.layer for each in statistics], statistics[0].num_experts)
    return [keep_best(each, saliency(each), kept[each.layer]) for each in statistics]


def saliency(statistics: LayerStatistics) -> np.ndarray[Any, Any]:
    """[E] mean of g|f| over the tokens routed to the expert; 0 where there were none."""
    selected = statistics.sums["selected"]
    return np.asarray(statistics.sums["gate_norm"] / np.maximum(selected, 1))
