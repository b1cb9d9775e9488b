"""MC-SMoE grouping (arXiv 2310.01334, sections 3.1 and 3.2).

Dominant experts are the most frequently activated ones; every other expert joins the dominant
expert of its layer whose router logits point in the most similar direction over all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.budget import adaptive, by_rank, thresholded
from stages.group.config import McSmoe
from stages.group.decision import LayerDecision
from stages.group.methods.base import Array, each_layer, evenly, nearest_centre


def decide(
    config: McSmoe, statistics: Sequence[LayerStatistics], total: int
) -> list[LayerDecision]:
    """Groups around dominant experts; see `base.Decide`."""
    if config.scope == "uniform":
        return evenly(statistics, total, group_layer)
    weighed = config.weigh_layers == "gain"
    frequency = {
        each.layer: each.frequency * (each.gain if weighed else 1.0) for each in statistics
    }
    if config.preset == "paper":
        kept = thresholded(total, frequency)
    else:
        kept = adaptive(total, frequency, config.min_per_layer)
    return each_layer(statistics, kept, group_layer)


def group_layer(statistics: LayerStatistics, kept: int) -> LayerDecision:
    """Nearest dominant expert by cosine; ties go to the lower id."""
    dominant = by_rank(statistics.frequency)[:kept]
    return nearest_centre(statistics, dominant, router_cosine(statistics.sums["logit_gram"]))


def router_cosine(gram: Array) -> Array:
    """[E, E] cosine of router-logit columns over all tokens, from their Gram matrix (equation 1).

    A column of zeros is similar to nothing but itself.
    """
    norms = np.sqrt(np.maximum(np.diag(gram), 0))
    scale = np.outer(norms, norms)
    cosine = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    np.fill_diagonal(cosine, 1.0)
    return np.asarray(np.clip((cosine + cosine.T) / 2, -1.0, 1.0))
