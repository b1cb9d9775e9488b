"""An expert whose matrices are stored as W = U V + S (MC-SMoE, arXiv 2310.01334, section 3.3).

S holds a few whole rows, or columns, and nothing else. Shapes: W [H, W], rank r, n kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from models.expert import Expert

Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Factored:
    """One matrix; `kept` holds row `index[i]` of S, or column `index[i]`, as its row i."""

    left: Tensor  # U [H, r]
    right: Tensor  # V [r, W]
    index: Tensor  # [n] int64, ascending
    kept: Tensor  # [n, W] by rows, [n, H] by columns
    axis: Axis = "rows"

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, as stored; S is absent where nothing of it is kept."""
        found = {"u": self.left, "v": self.right}
        return found | ({"index": self.index, "s": self.kept} if len(self.index) else {})

    def dense(self) -> Tensor:
        """U V + S [H, W], computed in fp32 and rounded once to the stored type."""
        whole = self.left.float() @ self.right.float()
        if len(self.index):
            turned = whole if self.axis == "rows" else whole.T
            turned.index_add_(0, self.index, self.kept.float())
        return whole.to(self.left.dtype)


@dataclass(frozen=True)
class FactoredExpert:
    """The same function as `dense()`; `rest` holds the biases, if there are any."""

    up: Factored
    down: Factored
    gate: Factored | None
    rest: dict[str, Tensor]

    def matrices(self) -> dict[str, Factored]:
        """The matrices that exist, by field of `Expert`."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: each for name, each in named.items() if each is not None}

    def parts(self) -> Iterator[Tensor]:
        """All tensors that are stored."""
        for each in self.matrices().values():
            yield from each.tensors().values()
        yield from self.rest.values()

    def dense(self) -> Expert:
        """The plain expert."""
        return Expert(**{n: each.dense() for n, each in self.matrices().items()}, **self.rest)


AnyExpert = Expert | FactoredExpert


def plain(expert: AnyExpert) -> Expert:
    """The expert with whole matrices, for formats that know no other."""
    return expert.dense() if isinstance(expert, FactoredExpert) else expert
