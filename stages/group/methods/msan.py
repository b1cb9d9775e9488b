"""Mean squared activation norm (MSAN) and mean activation norm (MAN), arXiv 2606.15716.

Means over routed tokens, without gates: neither rare experts nor small gates count against one.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.calibrate.statistics import LayerStatistics
from stages.group.config import Msan
from stages.group.decision import LayerDecision
from stages.group.methods.base import evenly, keep_best
from stages.group.methods.scores import per_token


def decide(config: Msan, statistics: Sequence[LayerStatistics], total: int) -> list[LayerDecision]:
    """The same number of experts in every layer; see `base.Decide`."""
    name = "norm_sq" if config.squared else "norm"
    return evenly(
        statistics, total, lambda each, kept: keep_best(each, per_token(each, name), kept)
    )
