"""Low-rank factors of a weight, W = U V + S (MC-SMoE after equation 3; LoSparse, arXiv 2306.11222).

Everything is computed in fp32 or better, whatever the weight is stored in: half-precision singular
values would make the residual S carry rounding errors instead of structure.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import torch
from torch import Tensor


def truncated_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [H, r] and V [r, W], whose product is the best rank-r approximation of `weight` [H, W].

    The singular values are split evenly, U = U' sqrt(s) and V = sqrt(s) V', so that neither factor
    dwarfs the other in training. A rank above min(H, W) is cut to it.

    Raises:
        ValueError: a rank below one.
    """
    if rank < 1:
        raise ValueError(f"a rank of at least 1 is needed, got {rank}")
    left, values, right = torch.linalg.svd(at_least_fp32(weight), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def leading(matrix: Tensor, rank: int) -> Tensor:
    """P [H, r]: orthonormal, the space of the r largest left singular vectors of [H, W] in fp64.

    By the eigenvectors of the smaller Gram matrix, several times faster than a full decomposition.
    Squaring costs half of the digits: singular values below 1e-8 of the largest are not told
    apart, which lies below the rounding of weights in fp32.
    """
    height, width = matrix.shape
    if height <= width:
        space: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)[:, :rank]
        return space
    vectors = torch.linalg.eigh(matrix.T @ matrix)[1].flip(1)[:, :rank]
    # By QR, since vectors of singular values near zero are no longer orthogonal after the product.
    basis: Tensor = torch.linalg.qr(matrix @ vectors)[0]
    return basis


def projected(matrix: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """U and V in fp32 with U V = P P'W for `space` P [H, r]; column i and row i of equal norm."""
    right = space.T @ matrix
    root = right.norm(dim=1).sqrt()
    return (space * root).float(), (right / torch.where(root > 0, root, 1.0)[:, None]).float()


def fast_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U V of `truncated_factors` in fp32, by `leading`; each pair up to its sign."""
    wide = weight.double()
    return projected(wide, leading(wide, rank))


def residual(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """S = W - U V: what the low-rank part leaves over, so that U V + S is W again."""
    return at_least_fp32(weight) - left @ right


def rank_from_ratio(ratio: float, height: int, width: int) -> int:
    """ceil(ratio H W / (H + W)): the rank at which both factors hold `ratio` of the elements.

    The paper's fixed r = 32 suits its 768 x 3072 experts only; a ratio carries over to other sizes.

    Raises:
        ValueError: a ratio that is not positive.
    """
    if not ratio > 0:
        raise ValueError(f"the ratio must be positive, got {ratio}")
    return ceil(Fraction(str(ratio)) * height * width / (height + width))


def stable_rank(weight: Tensor) -> float:
    """sum_i s_i^2 / max_i s_i^2 of the singular values s (MC-SMoE equation 3).

    It lies between 1 and the rank and does not depend on the scale; an all-zero weight has 0.
    """
    squares = torch.linalg.svdvals(at_least_fp32(weight)).double().square()
    largest = squares.max()
    return float(squares.sum() / largest) if largest > 0 else 0.0


def at_least_fp32(weight: Tensor) -> Tensor:
    """`weight` itself when it is fp32 or fp64, otherwise converted to fp32."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
