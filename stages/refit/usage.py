"""Which tokens use which kept expert, and with what gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Usage:
    """The tokens of one expert, ascending, and their gates."""

    tokens: Tensor  # [n] int64
    gates: Tensor  # [n] fp64

    def among(self, chosen: Tensor) -> Usage:
        """The part that lies in a mask over all tokens, [N] bool."""
        inside = chosen[self.tokens]
        return Usage(self.tokens[inside], self.gates[inside])


def usage(ids: Tensor, gates: Tensor, num_experts: int) -> list[Usage]:
    """Usage of experts 0 to K-1 from `ids` [N, k] and `gates` [N, k].

    Gates of ids that meet in one expert add up, as in the mapped format; a negative id is an
    expert that is gone, and its gate goes with it.
    """
    tokens = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    flat, weights = ids.reshape(-1), gates.double().reshape(-1)
    found = []
    for expert in range(num_experts):
        hit = flat == expert
        rows, where = torch.unique(tokens[hit], return_inverse=True)
        summed = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, where, weights[hit])
        found.append(Usage(rows, summed))
    return found
