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

# Removal is greedy in this many rounds, each with a fresh inverse: the share that stays shrinks by
# the same factor every round.
ROUNDS = 6


@dataclass(frozen=True)
class Narrowed:
    """Neurons that stay, their refitted rows, and what was lost."""

    kept: Tensor  # [I'] int64, ascending
    rows: Tensor  # [I', H] fp64: the new down projection, transposed
    error: float  # squared output error on the data of the Gram, ridge included
    energy: float  # squared output before


def narrow(gram: Tensor, rows: Tensor, keep: int, ridge: float, rounds: int = ROUNDS) -> Narrowed:
    """Keeps `keep` neurons of an expert.

    Args:
        gram: [I, I] fp64, h'h over the tokens that count.
        rows: [I, H] fp64, the down projection transposed.
        keep: I', 1 to I.
        ridge: added to the diagonal, in units of its mean: how much a token that was not seen
            counts. Keeps rarely active neurons from looking free.

    Raises:
        ValueError: `keep` is out of range.
    """
    neurons = len(rows)
    if not 1 <= keep <= neurons:
        raise ValueError(f"cannot keep {keep} of {neurons} neurons")
    damped = damp(gram, ridge)
    kept = torch.arange(neurons)
    for count in schedule(neurons, keep, rounds):
        kept = kept[_most_salient(damped, rows, kept, count)]
    return _resolved(damped, rows, kept)


def damp(gram: Tensor, ridge: float) -> Tensor:
    """[I, I] the Gram matrix with `ridge` mean diagonals added; the identity if there is no data.

    With the identity the surgeon keeps the largest rows of the down projection.
    """
    mean = float(gram.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(gram), dtype=torch.float64)
    return gram + torch.eye(len(gram), dtype=torch.float64) * (ridge * mean)


def schedule(neurons: int, keep: int, rounds: int) -> list[int]:
    """Neurons left after every round, in geometric steps, ending with `keep`."""
    steps = [round(neurons * (keep / neurons) ** (i / rounds)) for i in range(1, rounds + 1)]
    return sorted({min(max(step, keep), neurons) for step in steps}, reverse=True)


def _most_salient(gram: Tensor, rows: Tensor, kept: Tensor, count: int) -> Tensor:
    """[count] positions in `kept`, ascending; ties go to the lower one."""
    factor = torch.linalg.cholesky(gram[kept][:, kept])
    current = torch.cholesky_solve(gram[kept] @ rows, factor)  # W re-solved on the kept neurons
    inverse = torch.cholesky_inverse(factor).diagonal()
    saliency = current.square().sum(dim=1) / inverse
    order = torch.argsort(saliency, descending=True, stable=True)
    return order[:count].sort().values


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
