"""One feed-forward expert, and the symmetry that alignment exploits.

Shapes: H hidden size, I intermediate size (neurons). Two kinds share one type:
gated, three matrices   f(x) = down (act(gate x) * (up x))
plain, two matrices     f(x) = down act(up x + up_bias) + down_bias
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Expert:
    """Weights of one expert; `None` where the family has no such tensor."""

    up: Tensor  # [I, H]
    down: Tensor  # [H, I]
    gate: Tensor | None = None  # [I, H]
    up_bias: Tensor | None = None  # [I]
    gate_bias: Tensor | None = None  # [I]
    down_bias: Tensor | None = None  # [H]

    @property
    def neurons(self) -> int:
        """I, the number of hidden units."""
        return self.up.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that exist, by field name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def neuron_rows(self) -> list[Tensor]:
        """Every tensor with one row (or entry) per neuron: `[I, H]` and `[I]`."""
        rows = [self.gate, self.up, self.gate_bias, self.up_bias]
        return [tensor for tensor in rows if tensor is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Expert:
        """Applies `function` to every tensor."""
        return Expert(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def permuted(self, permutation: Tensor) -> Expert:
        """The same function with its neurons reordered: new neuron i is old `permutation[i]`.

        Rows of gate and up (and their biases) and columns of down move together (invariants 1, 4).

        Raises:
            ValueError: `permutation` is not a bijection of 0..I-1.
        """
        identity = torch.arange(self.neurons, device=permutation.device)
        if permutation.shape != identity.shape or not permutation.sort().values.equal(identity):
            raise ValueError(f"not a permutation of {self.neurons} neurons")
        return self.select(permutation)

    def select(self, neurons: Tensor) -> Expert:
        """The neurons `neurons` [I'] alone, in that order."""
        moved = {
            name: tensor[:, neurons] if name == "down" else tensor[neurons]
            for name, tensor in self.tensors().items()
            if name != "down_bias"
        }
        return Expert(**moved, down_bias=self.down_bias)
