"""MC-SMoE grouping (arXiv 2310.01334, sections 3.1 and 3.2).

Dominant experts are the most frequently activated ones; every other expert joins the dominant
expert of its layer whose router logits point in the most similar direction over all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.budget import adaptive, by_rank, uniform
from stages.group.config import McSmoe
from stages.group.decision import LayerDecision, from_labels


def decide(
    config: McSmoe, statistics: Sequence[LayerStatistics], total: int
) -> list[LayerDecision]:
    """Groups around dominant experts; see `base.Decide`."""
    if config.scope == "global":
        frequency = {each.layer: each.frequency for each in statistics}
        kept = adaptive(total, frequency, config.min_per_layer)
    else:
        layers = [each.layer for each in statistics]
        kept = uniform(total, layers, statistics[0].num_experts)
    return [group_layer(each, kept[each.layer]) for each in statistics]


def group_layer(statistics: LayerStatistics, kept: int) -> LayerDecision:
    """Nearest dominant expert by cosine; ties go to the lower id."""
    frequency = statistics.frequency
    dominant = np.sort(by_rank(frequency)[:kept])
    similarity = router_cosine(statistics.sums["logit_gram"])[:, dominant]  # [E, kept]
    nearest = dominant[np.argmax(similarity, axis=1)]
    nearest[dominant] = dominant
    return from_labels(statistics.layer, [int(r) for r in nearest], frequency.tolist())


def router_cosine(gram: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[E, E] cosine of router-logit columns over all tokens, from their Gram matrix (equation 1).

    A column of zeros is similar to nothing but itself.
    """
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    cosine = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    np.fill_diagonal(cosine, 1.0)
    return np.asarray(np.clip((cosine + cosine.T) / 2, -1.0, 1.0))
