"""HC-SMoE (arXiv 2410.08589): hierarchical clustering of experts by their mean outputs.

Every expert is evaluated on every sampled token; experts with near means are joined, whatever the
router does. Clusters merge around their most frequent expert.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.calibrate.statistics import LayerStatistics
from stages.group.clusters import agglomerate, squared_distances
from stages.group.config import HcSmoe
from stages.group.decision import LayerDecision
from stages.group.methods.base import Array, evenly, merge_clusters
from stages.group.methods.needs import sampled_tokens, subsample_of


def decide(
    config: HcSmoe, statistics: Sequence[LayerStatistics], total: int
) -> list[LayerDecision]:
    """The same number of clusters in every layer; see `base.Decide`."""
    return evenly(
        statistics,
        total,
        lambda each, kept: merge_clusters(
            each, agglomerate(output_distance(each), kept, config.linkage)
        ),
    )


def output_distance(statistics: LayerStatistics) -> Array:
    """[E, E] Euclidean distance of mean outputs over all sampled tokens."""
    subsample = subsample_of(statistics)
    mean = subsample["mean_output"] / sampled_tokens(subsample)  # [E, H]
    return squared_distances(mean @ mean.T) ** 0.5
