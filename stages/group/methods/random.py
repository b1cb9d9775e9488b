"""Chance, by a seed: the floor under every method, for pruning and for merging.

The draw of a layer depends on the seed and the layer's number alone, not on what else is merged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.config import Random
from stages.group.decision import LayerDecision
from stages.group.methods.base import evenly, keep_only, merge_clusters


def decide(
    config: Random, statistics: Sequence[LayerStatistics], total: int
) -> list[LayerDecision]:
    """The same number of experts in every layer; see `base.Decide`."""
    return evenly(statistics, total, lambda each, kept: draw(config, each, kept))


def draw(config: Random, statistics: LayerStatistics, kept: int) -> LayerDecision:
    """`kept` experts, or `kept` clusters none of which is empty."""
    order = np.random.default_rng([config.seed, statistics.layer]).permutation(
        statistics.num_experts
    )
    if config.others == "drop":
        return keep_only(statistics, order[:kept].tolist())
    labels = np.empty_like(order)
    # The first `kept` found the clusters; the others are dealt out in turn, in random order.
    labels[order] = np.arange(len(order)) % kept
    return merge_clusters(statistics, labels)
