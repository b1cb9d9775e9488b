"""The low-rank factors that are best on the inputs that were seen, not in the weights.

min |(W - U V) L|_F over rank r, with C = L L' the second moments of the inputs: with P the leading
left singular vectors of W L the minimum is U V = P P'W, so that L need not be inverted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.compress.lowrank import leading, projected


def second_moments(inputs: Tensor, ridge: float) -> Tensor:
    """C [W, W] fp64 of inputs [N, W], plus `ridge` times its mean diagonal.

    Without any input it is the identity, and whitening changes nothing.
    """
    wide = inputs.double()
    moments = wide.T @ wide
    mean = float(moments.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(moments), dtype=torch.float64)
    return moments + torch.eye(len(moments), dtype=torch.float64) * (ridge * mean)


def whitened_factors(weight: Tensor, rank: int, moments: Tensor) -> tuple[Tensor, Tensor]:
    """U [H, r] and V [r, W] fp32 with the least error on inputs with second moments C [W, W].

    Column i of U and row i of V have equal norms.

    Raises:
        ValueError: C is not positive definite.
    """
    wide = weight.double()
    factor, failed = torch.linalg.cholesky_ex(moments)
    if int(failed):
        raise ValueError("second moments are not positive definite: a ridge above 0 is needed")
    return projected(wide, leading(wide @ factor, rank))
