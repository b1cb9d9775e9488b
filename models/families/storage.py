"""How a family stores the experts of a layer: matrix by matrix, or fused over all experts.

Either way they become `models.expert.Expert`, the form in which they are aligned and merged. Names
are relative to the MoE block. Shapes: E experts, I neurons, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from models.checkpoint import Piece

if TYPE_CHECKING:
    from torch import Tensor

    from models.expert import Expert


class Storage(Protocol):
    """The experts of one layer on disk, or in the memory of transformers."""

    def owns(self, name: str) -> bool:
        """True for a tensor of routed experts."""

    def shapes(self, count: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all tensors of a layer with `count` experts."""

    def pieces(self, expert: int) -> dict[str, Piece]:
        """Field of `Expert` -> where it is stored; fused fields share a piece."""

    def unpack(self, found: Mapping[str, Tensor]) -> Expert:
        """One expert from its pieces by field."""

    def pack(self, experts: Sequence[Expert]) -> dict[str, Tensor]:
        """Name -> tensor of a layer with these experts; the inverse of `unpack`."""


def _gated() -> dict[str, str]:
    return {name: f"{name}_proj.weight" for name in ("gate", "up", "down")}


@dataclass(frozen=True)
class Separate:
    """One tensor per expert and matrix. `tensors`: field of `Expert` -> the end of its name."""

    tensors: dict[str, str] = field(default_factory=_gated)
    template: str = "experts.{expert}.{tensor}"

    def owns(self, name: str) -> bool:
        """See `Storage`."""
        return name.startswith(self.template.partition("{")[0])

    def shapes(self, count: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """See `Storage`."""
        kinds = _field_shapes(width, hidden)
        return {
            name: kinds[part] for e in range(count) for part, (name, _) in self.pieces(e).items()
        }

    def pieces(self, expert: int) -> dict[str, Piece]:
        """See `Storage`."""
        return {
            part: (self.template.format(expert=expert, tensor=tensor), None)
            for part, tensor in self.tensors.items()
        }

    def unpack(self, found: Mapping[str, Tensor]) -> Expert:
        """See `Storage`."""
        from models.expert import Expert

        return Expert(**found)

    def pack(self, experts: Sequence[Expert]) -> dict[str, Tensor]:
        """See `Storage`."""
        return {
            self.pieces(index)[part][0]: tensor
            for index, expert in enumerate(experts)
            for part, tensor in expert.tensors().items()
        }


@dataclass(frozen=True)
class Fused:
    """All experts in one tensor, gate and up together: `[E, 2I, H]` and `[E, H, I]`.

    `transposed` swaps the last two axes. `interleaved` alternates the rows of gate and up, which
    otherwise follow each other. `biases` adds `[E, 2I]` and `[E, H]`, named with `_bias`.
    """

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    transposed: bool = False
    interleaved: bool = False
    biases: bool = False

    def owns(self, name: str) -> bool:
        """See `Storage`."""
        return name.startswith(tuple(f"{each.partition('.')[0]}." for each in self._weights))

    @property
    def _weights(self) -> tuple[str, str]:
        return self.gate_up, self.down

    def shapes(self, count: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """See `Storage`."""
        gate_up, down = (2 * width, hidden), (hidden, width)
        found: dict[str, tuple[int, ...]] = {
            self.gate_up: (count, *(gate_up[::-1] if self.transposed else gate_up)),
            self.down: (count, *(down[::-1] if self.transposed else down)),
        }
        if self.biases:
            found |= {f"{self.gate_up}_bias": (count, 2 * width)}
            found |= {f"{self.down}_bias": (count, hidden)}
        return found

    def pieces(self, expert: int) -> dict[str, Piece]:
        """See `Storage`."""
        found: dict[str, Piece] = dict.fromkeys(("gate", "up"), (self.gate_up, expert))
        found["down"] = (self.down, expert)
        if self.biases:
            found |= dict.fromkeys(("gate_bias", "up_bias"), (f"{self.gate_up}_bias", expert))
            found["down_bias"] = (f"{self.down}_bias", expert)
        return found

    def unpack(self, found: Mapping[str, Tensor]) -> Expert:
        """See `Storage`."""
        from models.expert import Expert

        gate, up = self._split(self._turned(found["gate"]))
        biases = {}
        if self.biases:
            gate_bias, up_bias = self._split(found["gate_bias"])
            biases = {
                "gate_bias": gate_bias,
                "up_bias": up_bias,
                "down_bias": found["down_bias"],
            }
        return Expert(gate=gate, up=up, down=self._turned(found["down"]), **biases)

    def pack(self, experts: Sequence[Expert]) -> dict[str, Tensor]:
        """See `Storage`."""
        import torch

        found = {
            self.gate_up: torch.stack(
                [self._turned(self._joined(each.gate, each.up)) for each in experts]
            ),
            self.down: torch.stack([self._turned(each.down) for each in experts]),
        }
        if self.biases:
            both = [self._joined(each.gate_bias, each.up_bias) for each in experts]
            found[f"{self.gate_up}_bias"] = torch.stack(both)
            downs = [each.down_bias for each in experts if each.down_bias is not None]
            found[f"{self.down}_bias"] = torch.stack(downs)
        return found

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.transposed else matrix

    def _split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """`[2I, ...]` -> gate and up, each `[I, ...]`."""
        if self.interleaved:
            return both[::2], both[1::2]
        half = both.shape[0] // 2
        return both[:half], both[half:]

    def _joined(self, gate: Tensor | None, up: Tensor | None) -> Tensor:
        import torch

        if gate is None or up is None:
            raise ValueError("fused storage holds gated experts only")
        if self.interleaved:
            return torch.stack([gate, up], dim=1).flatten(0, 1)
        return torch.cat([gate, up])


def _field_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    rows = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return rows | {"gate_bias": (width,), "up_bias": (width,), "down_bias": (hidden,)}


GATED = Separate()
W123 = Separate({"gate": "w1.weight", "up": "w3.weight", "down": "w2.weight"})
IN_MEMORY = Fused()
