"""A low-rank approximation by random projection, where an exact SVD is too slow.

Halko, Martinsson, Tropp, "Finding structure with randomness" (arXiv 0909.4061): an orthonormal
basis Q of A Omega, with a Gaussian Omega of r + p columns, catches the range of A. Theorem 10.5
bounds the expected error of the projection without power iterations,
    E |A - Q Q'A|_F <= sqrt(1 + r / (p - 1)) (sum_{i > r} s_i^2)^(1/2),
and every power iteration (algorithm 4.4, orthonormalised) only sharpens the spectrum.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

OVERSAMPLING = 16
POWERS = 2
# A share of the smaller side up to which `auto` projects; beyond it the exact SVD costs as much.
_SHARE = 8


def bound_factor(rank: int, oversampling: int = OVERSAMPLING) -> float:
    """sqrt(1 + r / (p - 1)): expected error over the best possible one (theorem 10.5)."""
    return sqrt(1 + rank / (oversampling - 1))


def worthwhile(rank: int, shape: torch.Size) -> bool:
    """Whether r + p is at most an eighth of the smaller side of a matrix."""
    return _SHARE * (rank + OVERSAMPLING) <= min(shape)


def randomised_svd(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """P [H, r], s [r] descending and Q' [r, W] of a matrix [H, W] in fp32 or better.

    Deterministic for a seed, a type and a number of threads.
    """
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    if matrix.is_meta:
        probe = matrix.new_empty(matrix.shape[1], columns)
    else:
        generator = torch.Generator().manual_seed(seed)
        probe = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ probe)[0]
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]
