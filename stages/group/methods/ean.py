"""Expert activation norm: the sum of |f| over the tokens routed to an expert.

The gate-free baseline of the REAP paper (arXiv 2510.13999); its mean is an option.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.calibrate.statistics import LayerStatistics
from stages.group.config import Ean
from stages.group.decision import LayerDecision
from stages.group.methods.base import Array, evenly, keep_best
from stages.group.methods.scores import per_token


def decide(config: Ean, statistics: Sequence[LayerStatistics], total: int) -> list[LayerDecision]:
    """The same number of experts in every layer; see `base.Decide`."""
    return evenly(statistics, total, lambda each, kept: keep_best(each, score(config, each), kept))


def score(config: Ean, statistics: LayerStatistics) -> Array:
    """[E] sum of |f|, or its mean."""
    return per_token(statistics, "norm") if config.mean else statistics.sums["norm"]
