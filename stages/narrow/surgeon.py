"""Removes neurons of one expert by second-order saliency (Optimal Brain Surgeon, structured).

The expert's output is h W with gated activations h [N, I] and W = down' [I, H]. Given the Gram
matrix G = h'h of the routed tokens, removing neuron c and re-solving the others raises the squared
output error by exactly |W_c|^2 / (G^-1)_cc (Hassibi and Stork 1993, for a row of W instead of one
weight). The surviving rows absorb what the removed ones contributed: W_K = G_KK^-1 (G W)_K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Neurons are removed in about this many blocks: within a block one by one and exactly, among the
# least salient ones; all others are updated once per block, by matrix products.
BLOCKS = 64
# The least ridge: against exactly singular Grams (fewer tokens than neurons, dead neurons), far
# above the rounding of fp64 and far below any ridge that is worth choosing.
_JITTER = 1e-9


@dataclass(frozen=True)
class Narrowed:
    """Neurons that stay, their refitted rows, and what was lost."""

    kept: Tensor  # [I'] int64, ascending
    rows: Tensor  # [I', H] fp64: the new down projection, transposed
    error: float  # squared output error on the data of the Gram, ridge included
    energy: float  # squared output before


def narrow(gram: Tensor, rows: Tensor, keep: int, ridge: float, blocks: int = BLOCKS) -> Narrowed:
    """Keeps `keep` neurons of an expert.

    Args:
        gram: [I, I] fp64, h'h over the tokens that count.
        rows: [I, H] fp64, the down projection transposed.
        keep: I', 1 to I.
        ridge: added to the diagonal, in units of its mean: how much a token that was not seen
            counts. Keeps rarely active neurons from looking free.
        blocks: how often all that remain are judged anew.

    Raises:
        ValueError: `keep` is out of range.
    """
    neurons = len(rows)
    if not 1 <= keep <= neurons:
        raise ValueError(f"cannot keep {keep} of {neurons} neurons")
    damped = damp(gram, ridge)
    kept, block = torch.arange(neurons), -(-neurons // blocks)
    if keep < neurons:
        inverse, current = torch.cholesky_inverse(torch.linalg.cholesky(damped)), rows.clone()
        while len(kept) > keep:
            gone = _least_salient(inverse, current, min(block, len(kept) - keep))
            stays = torch.ones(len(kept), dtype=torch.bool)
            stays[gone] = False
            inverse, current = _without(inverse, current, gone, stays)
            kept = kept[stays]
    return _resolved(damped, rows, kept)


def damp(gram: Tensor, ridge: float) -> Tensor:
    """[I, I] the Gram matrix with `ridge` mean diagonals added; the identity if there is no data.

    Never less than 1e-9 of them, so that a Gram that is exactly singular can be solved.

    With the identity the surgeon keeps the largest rows of the down projection.
    """
    mean = float(gram.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(gram), dtype=torch.float64)
    return gram + torch.eye(len(gram), dtype=torch.float64) * (max(ridge, _JITTER) * mean)


def _least_salient(inverse: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count] positions to remove: one after another, each the least salient once the ones before
    it are gone. Looked for among twice as many that are the least salient now."""
    order = torch.argsort(_saliency(inverse, rows), stable=True)[: 2 * count]
    near, some = inverse[order][:, order].clone(), rows[order].clone()
    chosen: list[int] = []
    for _ in range(count):
        saliency = _saliency(near, some)
        saliency[chosen] = torch.inf
        worst = int(saliency.argmin())
        column = near[:, worst] / near[worst, worst]
        some -= column[:, None] * some[worst]
        near -= column[:, None] * near[worst]
        near[worst, worst] = 1.0  # what is gone is never looked at again
        chosen.append(worst)
    return order[chosen]


def _saliency(inverse: Tensor, rows: Tensor) -> Tensor:
    """[n] what removing each neuron alone would cost: |W_c|^2 / (G^-1)_cc."""
    return rows.square().sum(dim=1) / inverse.diagonal()


def _without(inverse: Tensor, rows: Tensor, gone: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse and re-solved rows of the neurons that stay, by block elimination."""
    beside = inverse[stays][:, gone]
    factors = torch.linalg.solve(inverse[gone][:, gone], beside.T).T  # [stay, gone]
    return inverse[stays][:, stays] - factors @ beside.T, rows[stays] - factors @ rows[gone]


def _resolved(gram: Tensor, rows: Tensor, kept: Tensor) -> Narrowed:
    """Rows that make the kept neurons stand in for all: [I', H]."""
    target = gram @ rows  # [I, H] = G W
    energy = float((rows * target).sum())
    if len(kept) == len(rows):
        return Narrowed(kept, rows.clone(), 0.0, energy)
    factor = torch.linalg.cholesky(gram[kept][:, kept])
    solved = torch.cholesky_solve(target[kept], factor)
    # |h W - h_K W_K|^2 = |hW|^2 - <(G W)_K, W_K> at the optimum.
    error = max(energy - float((target[kept] * solved).sum()), 0.0)
    return Narrowed(kept, solved, error, energy)
