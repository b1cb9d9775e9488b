"""Ridge least squares in closed form, centred on the weights that are already there.

A MoE layer is linear in its down projections. With features Phi [N, D] (gated activations of the
kept neurons, one row per token) and targets T [N, H] the refitted projections W [D, H] minimise

    |T - Phi W|^2 + sum_d ridge_d |W_d - P_d|^2        (P: the prior, the weights before the refit)

Everything needed of the data are the sums Phi'Phi and Phi'T, which are additive over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Against exactly singular Grams: more features than tokens, dead neurons. In units of the mean
# diagonal, far above the rounding of fp64 and far below any ridge that is worth choosing.
_JITTER = 1e-9


@dataclass(frozen=True)
class Solution:
    """Refitted weights and how well the system was conditioned."""

    weights: Tensor  # [D, H] fp64
    condition: float  # (largest / smallest diagonal of the Cholesky factor)^2, a lower bound


def gram(features: Tensor) -> Tensor:
    """Phi'Phi [D, D] in fp64 from features [N, D]."""
    wide = features.double()
    return wide.T @ wide


def ridge_of(gram_matrix: Tensor, strength: float) -> Tensor:
    """[D] the penalty per row: `strength` times the mean diagonal of the Gram matrix [D, D].

    In these units a strength means the same for any scale of the activations, and 1 makes the
    prior weigh as much as the data do on average.
    """
    mean = gram_matrix.diagonal().mean()
    return torch.full_like(gram_matrix.diagonal(), float(strength * mean))


def solve(gram_matrix: Tensor, cross: Tensor, ridge: Tensor, prior: Tensor) -> Solution:
    """The minimiser W for Phi'Phi [D, D], Phi'T [D, H], ridge [D] and prior [D, H], all fp64.

    Solved for the correction W - P, so that rounding never costs more than the correction. A Gram
    of zeros (no token at all) gives the prior back.
    """
    scale = gram_matrix.diagonal().mean()
    if not scale > 0:
        return Solution(prior.clone(), 1.0)
    system = gram_matrix + torch.diag(ridge + _JITTER * scale)
    factor = torch.linalg.cholesky(system)
    correction = torch.cholesky_solve(cross - gram_matrix @ prior, factor)
    diagonal = factor.diagonal()
    return Solution(prior + correction, float((diagonal.max() / diagonal.min()).square()))


def squared_error(gram_matrix: Tensor, cross: Tensor, target_sq: float, weights: Tensor) -> float:
    """|T - Phi W|^2 from the sums alone; `target_sq` is |T|^2."""
    fitted = (weights * (gram_matrix @ weights)).sum() - 2 * (weights * cross).sum()
    return max(float(fitted) + target_sq, 0.0)
