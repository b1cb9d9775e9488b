"""What a decision costs a layer, from sums alone: squared error over the energy of the output.

The layer's output is y = sum over experts of g f on the tokens of the sample, with the gates g that
the model used. The error of one decision is that of these replacements, added up:

* Dropped experts leave nothing behind: sum |sum over dropped of g f|^2, exact, all their pairs
  included (`gated_gram`). No token is routed anew and no gate grows, which the router of a native
  output does.
* A group hands all its tokens, under the sum of its gates, to F = sum w f over its members, w their
  merge weights: outputs are averaged. Exact for two members (the A, B, C sums of `subsample.pairs`;
  w of 1 and 0 is remapping). Of larger groups the sums hold every member's gated distance to every
  other but not the gated distance between two others; that is taken from all tokens, scaled.
  Weights are averaged in truth, not outputs, so that it is a proxy there as well.
* Narrowed experts lose their neurons of least energy g^2 a^2 |column of down|^2, as if neurons were
  uncorrelated and nothing was solved again: an estimate, mostly far above what a refit leaves.

What two groups, or a group and a dropped expert, do to the same token is added as if it were
uncorrelated.
"""

from __future__ import annotations

import numpy as np

from stages.calibrate.observer import Sums
from stages.group.decision import LayerDecision
from stages.merge.mean import normalised
from stages.subsample.columns import Array


def predicted_error(subsample: Sums, decision: LayerDecision) -> float:
    """The error of a layer, a share of its output energy; 0 where everything is kept.

    Args:
        subsample: sums of all experts on the sample (`stages.subsample.columns`), E experts.
        decision: what becomes of them.
    """
    return float(expert_errors(subsample, decision).sum())


def expert_errors(subsample: Sums, decision: LayerDecision) -> Array:
    """[E] float64: each expert's part of `predicted_error`; what two share is halved.

    A part may be negative: an expert dropped with another that it mostly cancelled.
    """
    energy = output_energy(subsample)
    errors = np.zeros(len(decision.group))
    dropped = [e for e, group in enumerate(decision.group) if group is None]
    errors[dropped] = subsample["gated_gram"][np.ix_(dropped, dropped)].sum(axis=1)
    for members in decision.members:
        if len(members) > 1:
            ids = list(members)
            errors[ids] = group_errors(subsample, ids, _shares(decision, ids))
    if decision.width is not None:
        kept = [e for e, group in enumerate(decision.group) if group is not None]
        errors[kept] += width_errors(subsample, decision.width)[kept]
    return errors / energy if energy > 0 else np.zeros_like(errors)


def output_energy(subsample: Sums) -> float:
    """Sum of |y|^2 over the sample, y what the routed experts add up to."""
    return float(subsample["gated_gram"].sum())


def width_errors(subsample: Sums, width: int) -> Array:
    """[E] float64: energy of the neurons that an expert of `width` neurons does without."""
    return width_curve(subsample)[:, width]


def width_curve(subsample: Sums) -> Array:
    """[E, I + 1] float64: `width_errors` of every width from 0 to I."""
    ordered = np.sort(subsample["neuron_output"], axis=1)
    lost = np.concatenate([np.zeros((len(ordered), 1)), ordered.cumsum(axis=1)], axis=1)
    return lost[:, ::-1]


def predicted_curve(subsample: Sums) -> dict[int, float]:
    """Width -> `predicted_error` of giving it to every expert of the layer, for widths from 1."""
    energy, lost = output_energy(subsample), width_curve(subsample).sum(axis=0)
    return {w: float(lost[w] / energy) if energy > 0 else 0.0 for w in range(1, len(lost))}


def group_errors(subsample: Sums, members: list[int], weights: Array) -> Array:
    """[M] float64: squared errors of the members of a group, their pairs' halved.

    Args:
        members: M ids.
        weights: [M], their sum is 1.
    """
    some = np.ix_(members, members)
    swap, both = subsample["swap"][some], subsample["both"][some]
    squares, gram = subsample["output_sq"][members], subsample["output_gram"][some]
    free = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)  # [M, M] over all tokens
    np.fill_diagonal(free, 0.0)
    own = np.maximum(_own(swap, free, weights), 0.0)
    # |f_i - F|^2 over all tokens, and from it the product of what i and j deviate by.
    away = (free * weights).sum(axis=1) - _spread(free, weights)
    products = (away[:, None] + away[None, :] - free) / 2
    scale = np.divide(both, free, out=np.zeros_like(both), where=free > 0)
    return np.asarray(own + (scale * products).sum(axis=1))


def _own(swap: Array, free: Array, weights: Array) -> Array:
    """[M] sum of g_i^2 |f_i - F|^2: |f_i - F|^2 = sum w_l d_il - sum over pairs of w_l w_m d_lm."""
    size = len(swap)
    totals = free.sum(axis=1)
    gated = np.divide(swap.sum(axis=1), totals, out=np.zeros(size), where=totals > 0)
    found = np.empty(size)
    for i in range(size):
        distances = gated[i] * free  # between two others: estimated
        distances[i, :] = distances[:, i] = swap[i]  # from i: exact
        found[i] = (distances[i] * weights).sum() - _spread(distances, weights)
    return found


def _spread(distances: Array, weights: Array) -> float:
    """Mean over pairs of half their distance: sum of w_l |f_l - F|^2."""
    # Not a matrix product: its order of additions may depend on threads.
    return float((weights[:, None] * distances * weights).sum() / 2)


def _shares(decision: LayerDecision, members: list[int]) -> Array:
    """[M] merge weights, as the merge normalises them."""
    return np.array(normalised([decision.weight[expert] for expert in members]))
