"""MergeMoE's grouping (arXiv 2510.14436): nearest frequent expert by input matrices.

Centres are the most frequent experts; every other expert joins the one whose gate and up matrices
are nearest, neuron by neuron. The paper then solves the merged down projection by least squares,
which is the refit's work here, for any method.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.calibrate.statistics import LayerStatistics
from stages.group.budget import by_rank
from stages.group.config import MergeMoe
from stages.group.decision import LayerDecision
from stages.group.methods.base import evenly, nearest_centre
from stages.group.methods.needs import weights_of


def decide(
    config: MergeMoe, statistics: Sequence[LayerStatistics], total: int
) -> list[LayerDecision]:
    """The same number of groups in every layer; see `base.Decide`."""
    return evenly(
        statistics,
        total,
        lambda each, kept: nearest_centre(each, by_rank(each.frequency)[:kept], -weights_of(each)),
    )
