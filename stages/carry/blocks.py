"""Which layers are refitted at once, behind the reduced layers before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerBlock:
    """Decoder layers `start` to `stop` - 1; the last of them, and maybe others, are refitted."""

    index: int
    start: int
    stop: int
    layers: tuple[int, ...]  # those that are refitted

    @property
    def name(self) -> str:
        """`block-00002`."""
        return f"block-{self.index:05d}"

    @property
    def share(self) -> float:
        """What one layer mends of an error in the residual stream; all of a block mend it whole."""
        return 1 / len(self.layers)


def cut(layers: Sequence[int], size: int) -> list[LayerBlock]:
    """Blocks of `size` refitted layers; those that are not refitted lie in the block behind them.

    Args:
        layers: the refitted ones, ascending. Layers behind the last one are in no block.
    """
    found: list[LayerBlock] = []
    for index, first in enumerate(range(0, len(layers), size)):
        some = tuple(layers[first : first + size])
        found.append(LayerBlock(index, found[-1].stop if found else 0, some[-1] + 1, some))
    return found
