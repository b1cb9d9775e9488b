"""What experts do to each other's tokens: sums over a chunk, and the errors that follow from them.

For two experts i, j with outputs f and gates g (zero where not selected), d = f_i - f_j:
replacing both by w f_i + (1 - w) f_j under the gate g_i + g_j costs, summed over the tokens,
`C - 2 w B + w^2 A` with A = sum (g_i + g_j)^2 |d|^2, B = sum g_i (g_i + g_j) |d|^2 and
C = sum g_i^2 |d|^2. All three come from `swap` (C) and `both` (sum g_i g_j |d|^2), which are zero
on every token that selected neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.subsample.columns import Array


@dataclass(frozen=True)
class PairErrors:
    """`[E, E]` float64, exact for one pair whose outputs are averaged; for weights a proxy."""

    total: Array  # A
    weight: Array  # w of expert i (the row) that costs least, B / A; 1/2 where nothing differs
    merge: Array  # the cost at that weight, C - B^2 / A
    remap: Array  # the cost of w = 1: the tokens of j (the column) go to i


def pair_errors(swap: Array, both: Array) -> PairErrors:
    """The errors of merging and of remapping every pair, from two `[E, E]` sums.

    C - B^2 / A is computed as (C_ij C_ji - both^2) / A: the same number without the cancellation.
    """
    total = swap + swap.T + 2 * both
    differs = total > 0
    share = np.divide(swap + both, total, out=np.full_like(total, 0.5), where=differs)
    left = np.maximum(swap * swap.T - both * both, 0.0)
    merge = np.divide(left, total, out=np.zeros_like(total), where=differs)
    return PairErrors(total, share, merge, swap.T.copy())


def chunk_sums(outputs: Tensor, ids: Tensor, gates: Tensor) -> dict[str, Tensor]:
    """Sums over a chunk of c tokens of one domain, by the names of the table's columns.

    Args:
        outputs: [c, E, H] float64, every expert on every token, before weighting.
        ids: [c, k] selected experts.
        gates: [c, k] float64, the weights that the model multiplied with.
    """
    count, experts, _ = outputs.shape
    products = torch.bmm(outputs, outputs.mT)  # [c, E, E]
    squares = products.diagonal(dim1=1, dim2=2)  # [c, E]
    norms = squares.sqrt()
    norms = torch.where(norms > 0, norms, 1.0)  # the cosine with nothing is zero
    zeros = torch.zeros(count, experts, dtype=torch.float64, device=outputs.device)
    dense, chosen = zeros.scatter(1, ids, gates), zeros.scatter(1, ids, 1.0)
    return _pairs(products, squares, dense, ids, gates) | {
        "sampled": torch.full((experts,), count),
        "sampled_selected": chosen.sum(0).round().long(),
        "output_sq": squares.sum(0),
        "gated_energy": (dense.square() * squares).sum(0),
        "mean_output": outputs.sum(0),
        "routed_output": torch.bmm(chosen.T.unsqueeze(1), outputs.transpose(0, 1)).squeeze(1),
        "output_gram": _symmetric(products.sum(0)),
        "cosine": _symmetric((products / (norms.unsqueeze(2) * norms.unsqueeze(1))).sum(0)),
    }


def _pairs(
    products: Tensor, squares: Tensor, dense: Tensor, ids: Tensor, gates: Tensor
) -> dict[str, Tensor]:
    """`swap`, `both`, `gated_gram` from [c, k, E]: only the k selected experts have a gate."""
    experts = squares.shape[1]
    rows = products.gather(1, ids.unsqueeze(2).expand(-1, -1, experts))
    distance = (squares.gather(1, ids).unsqueeze(2) + squares.unsqueeze(1) - 2 * rows).clamp_min(0)
    weighted = gates.unsqueeze(2) * distance
    # A product with one-hot rows adds in a fixed order on every device; scattering does not.
    owner = torch.nn.functional.one_hot(ids.reshape(-1), experts).double().T  # [E, c k]
    both = owner @ (dense.unsqueeze(1) * weighted).reshape(-1, experts)
    swap = owner @ (gates.unsqueeze(2) * weighted).reshape(-1, experts)
    gated = gates.unsqueeze(2) * dense.unsqueeze(1) * rows
    gram = owner @ gated.reshape(-1, experts)
    # An expert does not differ from itself; its distance above is rounding.
    return {
        "swap": swap.fill_diagonal_(0),
        "both": _symmetric(both).fill_diagonal_(0),
        "gated_gram": _symmetric(gram),
    }


def _symmetric(matrix: Tensor) -> Tensor:
    """Both triangles may differ in their last bits."""
    return (matrix + matrix.T) / 2
