"""Which of a model's values belong together: those of one layer, the others one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from torch import Tensor

from stages.recover.state import Named


def layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.gate.weight`; a name without a number as it is."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def by_layer(values: Iterable[tuple[str, Tensor]]) -> Iterator[Named]:
    """Values in the model's order, a layer at a time."""
    for _, found in groupby(values, key=lambda pair: layer_of(pair[0])):
        yield dict(found)


def largest_layer(sizes: Mapping[str, int]) -> int:
    """The most values that one layer has, or one value outside layers."""
    found: dict[str, int] = {}
    for name, size in sizes.items():
        found[layer_of(name)] = found.get(layer_of(name), 0) + size
    return max(found.values(), default=0)
