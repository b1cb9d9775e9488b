"""REAP pruning (arXiv 2510.13999): router-weighted expert activation."""

from __future__ import annotations

from collections.abc import Sequence

from stages.calibrate.statistics import LayerStatistics
from stages.group.config import Reap
from stages.group.decision import LayerDecision
from stages.group.methods.base import evenly, keep_best
from stages.group.methods.scores import saliency


def decide(config: Reap, statistics: Sequence[LayerStatistics], total: int) -> list[LayerDecision]:
    """The same number of experts in every layer; see `base.Decide`."""
    return evenly(statistics, total, lambda each, kept: keep_best(each, saliency(each), kept))
