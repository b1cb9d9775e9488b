"""UNCURL (arXiv 2409.01483, algorithm 1): spectral clustering of experts by their router logits.

Per layer, exactly as many clusters as experts are kept. The affinity (1 + cosine) / 2 of logit
columns needs their Gram matrix alone. Clusters merge around their most frequent expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.clusters import k_means
from stages.group.config import Uncurl
from stages.group.decision import LayerDecision
from stages.group.methods import mc_smoe
from stages.group.methods.base import Array, evenly, keep_best, merge_clusters


def decide(
    config: Uncurl, statistics: Sequence[LayerStatistics], total: int
) -> list[LayerDecision]:
    """The same number of clusters in every layer; see `base.Decide`."""
    first = min(each.layer for each in statistics)
    # The model's first MoE layer may be among those that are skipped.
    if config.first_layer != "frequency" or min(config.skip_layers, default=first) < first:
        first = -1

    def decide_layer(statistics: LayerStatistics, kept: int) -> LayerDecision:
        if config.grouping == "frequency_prune":
            return keep_best(statistics, statistics.frequency, kept)
        if config.grouping == "frequency_merge" or statistics.layer == first:
            return mc_smoe.group_layer(statistics, kept)
        return cluster_layer(config, statistics, kept)

    return evenly(statistics, total, decide_layer)


def cluster_layer(config: Uncurl, statistics: LayerStatistics, kept: int) -> LayerDecision:
    """Spectral clustering. Experts enter in an order of their own, so that ids do not matter.

    Ids decide only between experts with equal norms of logits and equal frequencies.
    """
    gram = statistics.sums["logit_gram"]
    order = np.lexsort((-statistics.frequency, -np.diag(gram)))
    similarity = affinity(gram[np.ix_(order, order)], config.center_logits == "token")
    rows = embedding(similarity, kept, zero_diagonal=config.zero_diagonal)
    labels = np.empty(len(order), dtype=np.int64)
    labels[order] = k_means(rows, kept, seed=config.seed, starts=config.n_init)
    return merge_clusters(statistics, labels)


def affinity(gram: Array, centered: bool = False) -> Array:
    """[E, E] in [0, 1] with ones on the diagonal: (1 + cosine of logit columns) / 2.

    A shift of all logits of a token leaves every softmax as it is but pushes all cosines to 1;
    `centered` takes each token's mean over the experts away, which the Gram matrix allows.
    """
    if centered:
        gram = gram - gram.mean(axis=0, keepdims=True)
        gram = gram - gram.mean(axis=1, keepdims=True)
    return np.asarray((1 + mc_smoe.router_cosine(gram)) / 2)


def embedding(similarity: Array, count: int, *, zero_diagonal: bool) -> Array:
    """[E, count] rows of norm 1: leading eigenvectors of D^-1/2 S D^-1/2 (Ng, Jordan, Weiss 2001).

    An expert without any similarity has row zero. Signs of eigenvectors are arbitrary and change
    no distance.
    """
    similarity = similarity.copy()
    if zero_diagonal:
        np.fill_diagonal(similarity, 0.0)
    degree = similarity.sum(axis=1)
    scale = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    _, vectors = np.linalg.eigh(similarity * np.outer(scale, scale))
    rows = vectors[:, ::-1][:, :count]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12))
