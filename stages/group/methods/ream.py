"""REAM (arXiv 2604.04356): the most salient experts absorb the ones most similar to them.

Centres are the K experts with the highest REAP saliency. In descending saliency, each takes the
nearest experts that are still free until its group is full, so that groups are few and bounded and
many centres stay alone. Members weigh by their saliency.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.budget import by_rank
from stages.group.config import Ream
from stages.group.decision import LayerDecision, from_labels
from stages.group.methods.base import Array, evenly
from stages.group.methods.mc_smoe import router_cosine
from stages.group.methods.needs import sampled_tokens, subsample_of
from stages.group.methods.scores import saliency


def decide(config: Ream, statistics: Sequence[LayerStatistics], total: int) -> list[LayerDecision]:
    """The same number of groups in every layer; see `base.Decide`."""
    return evenly(statistics, total, lambda each, kept: absorb(config, each, kept))


def absorb(config: Ream, statistics: LayerStatistics, kept: int) -> LayerDecision:
    """Groups of one layer; between equals the lower id goes first.

    Raises:
        BudgetError: groups of the given size cannot hold all experts.
    """
    count, score, near = statistics.num_experts, saliency(statistics), similarity(statistics)
    size = config.group_size or max(2, -(-count // kept))
    config.check(count, kept)
    centres = by_rank(score)[:kept].tolist()
    free = sorted(set(range(count)) - set(centres))
    labels: list[int | None] = list(range(count))
    for centre in centres:
        ranked = sorted(free, key=lambda expert: (-near[centre, expert], expert))
        for expert in ranked[: size - 1]:
            labels[expert] = centre
            free.remove(expert)
    return from_labels(statistics.layer, labels, score.tolist())


def similarity(statistics: LayerStatistics) -> Array:
    """[E, E] in [0, 1]: mean of the similarities of outputs and of router logits.

    Outputs: mean over sampled tokens of (1 + cosine) / 2; gates are positive and cancel in it.
    Logits: 1 - d / max d, with d the distance of logit columns of norm 1.
    """
    subsample = subsample_of(statistics)
    outputs = (1 + subsample["cosine"] / sampled_tokens(subsample)) / 2
    distance = np.sqrt(np.maximum(2 - 2 * router_cosine(statistics.sums["logit_gram"]), 0.0))
    largest = distance.max()
    logits = 1 - distance / largest if largest > 0 else np.ones_like(distance)
    return np.asarray((outputs + logits) / 2)
