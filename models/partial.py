"""Which part of a model and of its files belongs to a range of experts.

Routers and everything dense are whole. Tensors of other experts are never read: where a file holds
one tensor per expert they are left out, of one tensor for all experts the rows are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from models.blocks import find_block
from models.errors import CheckpointError

# In the memory of a model, and on disk where a file holds one tensor per expert.
_FUSED = re.compile(r"\.experts\.\w+$")
_SINGLE = re.compile(r"\.experts\.(\d+)\.")


def narrow(layers: Iterable[nn.Module], experts: range) -> None:
    """Leaves room for `experts` alone in every MoE layer; they then count from zero.

    The layers must be without memory. Their `experts` modules cannot answer for experts that are
    absent: wrap them before the model is run.

    Raises:
        CheckpointError: the family does not keep its experts in tensors `[E, ...]`.
    """
    for layer in layers:
        block = find_block(layer)
        if block is None:
            continue
        module: Any = block.experts
        held = list(module.named_parameters())
        total = getattr(module, "num_experts", None)
        if not held or any("." in name or len(tensor) != total for name, tensor in held):
            raise CheckpointError(
                f"{type(module).__name__} keeps its experts in modules of their own",
                "set executor.ranks_per_replica=1: this family cannot be dealt out",
            )
        for name, tensor in held:
            setattr(module, name, nn.Parameter(tensor[list(experts)], requires_grad=False))
        module.num_experts = len(experts)


def is_needed(name: str, experts: range) -> bool:
    """Whether a tensor on disk holds anything but other experts."""
    number = _SINGLE.search(name)
    return number is None or int(number[1]) in experts


def needed_part(name: str, memory_name: str, tensor: Any, experts: range) -> Any:
    """A safetensors slice, or where it holds all experts of a layer, the rows of `experts`."""
    fused = _FUSED.search(memory_name) and not _SINGLE.search(name)
    return _Rows(tensor, experts) if fused else tensor


class _Rows:
    """Rows of a safetensors slice, read when they are asked for as the whole tensor would be."""

    def __init__(self, tensor: Any, rows: range) -> None:
        self._tensor, self._rows = tensor, rows

    def __getitem__(self, index: Any) -> Tensor:
        assert index is ..., index
        found: Tensor = self._tensor[self._rows.start : self._rows.stop]
        return found
