"""The expert step of STUN (arXiv 2409.06211): clusters of similar router rows.

Distance is that of router rows less what the experts are selected together, both divided by their
mean; clusters grow by complete linkage. The expert nearest to the centre of a cluster stays. The
published code steps a threshold until a global total is met; here every layer keeps the same
number, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.clusters import agglomerate, squared_distances
from stages.group.config import Stun
from stages.group.decision import LayerDecision, from_labels
from stages.group.methods.base import Array, evenly, keep_only
from stages.group.methods.needs import router_of

# Squared distances that differ by less, relative to the largest, are equal but for rounding.
_SAME = 1e-9


def decide(config: Stun, statistics: Sequence[LayerStatistics], total: int) -> list[LayerDecision]:
    """The same number of experts in every layer; see `base.Decide`."""
    return evenly(statistics, total, lambda each, kept: cluster_layer(config, each, kept))


def cluster_layer(config: Stun, statistics: LayerStatistics, kept: int) -> LayerDecision:
    """Clusters of one layer, and what becomes of the experts beside their central one."""
    labels = agglomerate(distance(config, statistics), kept, "complete")
    central = {int(c): _central(statistics, np.flatnonzero(labels == c)) for c in np.unique(labels)}
    if config.others == "drop":
        return keep_only(statistics, list(central.values()))
    joined = [central[int(cluster)] for cluster in labels]
    return from_labels(statistics.layer, joined, statistics.frequency.tolist())


def distance(config: Stun, statistics: LayerStatistics) -> Array:
    """[E, E]: distance of router rows / its mean - coactivation * co-selections / their mean.

    May be negative, which complete linkage does not mind.
    """
    rows = router_of(statistics)
    found = _over_mean(np.sqrt(squared_distances(rows @ rows.T)))
    return found - config.coactivation * _over_mean(statistics.sums["co_selected"])


def _over_mean(pairs: Array) -> Array:
    """Divided by the mean over pairs of different experts; zeros on the diagonal."""
    pairs = pairs.astype(np.float64)
    np.fill_diagonal(pairs, 0.0)
    mean = np.abs(pairs).sum() / (len(pairs) * (len(pairs) - 1))
    return pairs / mean if mean > 0 else pairs


def _central(statistics: LayerStatistics, members: Array) -> int:
    """The member whose row lies nearest to the members' mean.

    Two members always lie equally near: the more frequent one is central, then the lower id.
    """
    rows = router_of(statistics)[members]
    offsets = ((rows - rows.mean(axis=0)) ** 2).sum(axis=1)
    nearest = offsets <= offsets.min() + _SAME * offsets.max()
    return int(members[np.argmax(np.where(nearest, statistics.frequency[members], -1.0))])
