"""What a router with other tensors would choose, asked of the family's own block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import find_blocks
from models.classes import prepare_classes
from models.moe import MoeCheckpoint


class _Chosen(Exception):
    """Ends a forward pass; nothing is wrong."""

    def __init__(self, ids: Tensor, gates: Tensor) -> None:
        self.ids, self.gates = ids, gates


class _Stop(nn.Module):
    """Stands where the experts stood and ends the pass with what it was called with."""

    def forward(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        raise _Chosen(ids, gates)


class _Same(nn.Module):
    """Stands where shared experts stood; what comes of it is never looked at."""

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        return hidden


@torch.inference_mode()
def route(
    moe: MoeCheckpoint,
    config: Mapping[str, Any],
    layer: int,
    routers: Mapping[str, Tensor],
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choices of a layer's router, softmax or sigmoid, biased or grouped, as the family has it.

    Args:
        config: config.json that the router goes with; it may count fewer experts.
        routers: disk name -> weight [K, H] and biases of the router.
        hidden: [N, H] what enters the block.

    Returns:
        ids [N, k] int64 and gates [N, k] float32.
    """
    from transformers import AutoConfig, AutoModel

    prepare_classes(config)
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**config))
    found = find_blocks(model)[layer]
    block = found.block
    for name, child in block.named_children():
        if child is found.experts:
            setattr(block, name, _Stop())
        elif child is not found.router:
            setattr(block, name, _Same())
    prefix = moe.family.memory_prefix(layer)
    state = {
        moe.family.memory_name(name).removeprefix(prefix): tensor.float()
        for name, tensor in routers.items()
    }
    block.load_state_dict(state, assign=True)
    try:
        block.eval()(hidden.float()[None])
    except _Chosen as chosen:
        return chosen.ids, chosen.gates.float()
    raise AssertionError(f"the block of layer {layer} did not call its experts")
