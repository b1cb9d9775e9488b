"""Where the MoE blocks of a live transformers model are, and what they consist of.

Found by structure, not by family: a block owns its routed experts as a child called `experts` and
beside them the module that chooses among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from models.errors import CheckpointError

_EXPERTS = "experts"
# All families call it one of these; gates of shared experts have longer names.
_ROUTERS = ("router", "gate")


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block. What its forward does besides (shared experts, scaling) is its own affair."""

    block: nn.Module
    router: nn.Module
    experts: nn.Module


def find_blocks(model: Any) -> dict[int, MoeBlock]:
    """Layer -> its MoE block; dense layers have none.

    Layers count from 0. In an encoder-decoder they go on counting: decoder layer j is layer
    (number of encoder layers) + j.

    Raises:
        CheckpointError: the model has no list of layers, or a layer has more than one block.
    """
    found = {index: find_block(layer) for index, layer in enumerate(model_layers(model))}
    return {index: block for index, block in found.items() if block is not None}


def find_block(layer: nn.Module) -> MoeBlock | None:
    """The MoE block of one decoder or encoder layer; None in a dense layer.

    Raises:
        CheckpointError: more than one block, so that a layer number would not name its experts.
    """
    found = [block for module in layer.modules() if (block := _as_block(module)) is not None]
    if len(found) > 1:
        names = ", ".join(type(each.block).__name__ for each in found)
        raise CheckpointError(
            f"a {type(layer).__name__} has {len(found)} MoE blocks ({names})",
            "use a model with one MoE block per layer",
        )
    return found[0] if found else None


def model_layers(model: Any) -> list[nn.Module]:
    """All layers in their global order: the decoder's, behind the encoder's if there is one.

    Raises:
        CheckpointError: not exactly one list of layers in the model or in one of its two stacks.
    """
    base = model.base_model
    if not model.config.is_encoder_decoder:
        return list(_stack(base))
    return [*_stack(base.get_encoder()), *_stack(base.get_decoder())]


def encoder_depth(model: Any) -> int:
    """The first layer of an encoder-decoder that belongs to its decoder."""
    return len(_stack(model.base_model.get_encoder()))


def _as_block(module: nn.Module) -> MoeBlock | None:
    experts = getattr(module, _EXPERTS, None)
    if not isinstance(experts, nn.Module):
        return None
    children = dict(module.named_children())
    routers = [children[name] for name in _ROUTERS if name in children]
    return MoeBlock(module, routers[0], experts) if len(routers) == 1 else None


def _stack(base: nn.Module) -> nn.ModuleList:
    """The one list of layers of a stack; other lists (of adapters, heads) have other lengths."""
    lists = [each for each in base.children() if isinstance(each, nn.ModuleList) and len(each)]
    if len(lists) != 1:
        raise CheckpointError(
            f"{type(base).__name__} has {len(lists)} lists of layers, one is needed",
            "use a model with one stack of layers, or an encoder and a decoder",
        )
    return lists[0]
