"""Frequency pruning: the most often selected experts stay. The simplest baseline."""

from __future__ import annotations

from collections.abc import Sequence

from stages.calibrate.statistics import LayerStatistics
from stages.group.config import Frequency
from stages.group.decision import LayerDecision
from stages.group.methods.base import evenly, keep_best


def decide(
    config: Frequency, statistics: Sequence[LayerStatistics], total: int
) -> list[LayerDecision]:
    """The same number of experts in every layer; see `base.Decide`."""
    return evenly(statistics, total, lambda each, kept: keep_best(each, each.frequency, kept))
