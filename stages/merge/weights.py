"""How much each member of a group counts in its merge: pure functions of the statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.decision import LayerDecision
from stages.group.methods.needs import subsample_of
from stages.group.methods.scores import saliency
from stages.merge.config import MergeConfig

Array = np.ndarray[Any, Any]


def with_weights(
    decisions: Sequence[LayerDecision],
    statistics: Sequence[LayerStatistics],
    config: MergeConfig,
) -> list[LayerDecision]:
    """The same groups with the weights that the config asks for.

    Raises:
        StatisticsError: alpha without a sample.
    """
    if config.weights == "method":
        return list(decisions)
    by_layer = {each.layer: each for each in statistics}
    return [
        replace(each, weight=tuple(_weights(config, each, by_layer[each.layer]).tolist()))
        for each in decisions
    ]


def _weights(config: MergeConfig, decision: LayerDecision, statistics: LayerStatistics) -> Array:
    """[E]"""
    if config.weights == "uniform":
        return np.ones(statistics.num_experts)
    if config.weights == "frequency":
        return statistics.frequency
    if config.weights == "saliency":
        return saliency(statistics)
    if all(len(members) == 1 for members in decision.members):
        return np.ones(statistics.num_experts)  # nothing is merged, and perhaps nothing sampled
    subsample = subsample_of(statistics)
    return alpha(decision, subsample["swap"], subsample["both"])


def alpha(decision: LayerDecision, swap: Array, both: Array) -> Array:
    """[E] weights, each group's summing to 1, that cost least where outputs are averaged.

    A member k counts B_k = sum over the other members l, and over tokens, of
    g_k (g_k + g_l) |f_k - f_l|^2. For a pair that is B / A, the exact minimum of
    sum |g_k f_k + g_l f_l - (g_k + g_l) (w f_k + (1 - w) f_l)|^2. For larger groups, whose minimum
    pair sums do not determine, it is a rule that agrees with it on every pair. Members whose
    outputs never differ count alike.

    Args:
        swap: [E, E] sum of g_i^2 |f_i - f_j|^2.
        both: [E, E] sum of g_i g_j |f_i - f_j|^2.
    """
    found = np.ones(len(decision.group))
    for members in decision.members:
        found[list(members)] = pairwise_alpha(swap, both, members)
    return found


def pairwise_alpha(swap: Array, both: Array, members: Sequence[int]) -> Array:
    """[M] the weights of one group's members, as in `alpha`."""
    ids = np.ix_(members, members)
    counts = (swap[ids] + both[ids]).sum(axis=1)
    total = counts.sum()
    return counts / total if total > 0 else np.full(len(members), 1 / len(members))
