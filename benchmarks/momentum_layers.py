"""What the sparse layers of a model do on a text: how even their load, how large their outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import find_blocks
from models.streaming.model import hidden_of


@torch.inference_mode()
def layer_figures(
    model: Any, tokenizer: Any, texts: Sequence[str], length: int
) -> list[dict[str, float]]:
    """Per sparse layer, in windows of `length` tokens:

    `load_entropy`, of the shares of selections over ln E (1: even); `load_largest`, the largest
    share times E; `output_norm`, mean |u| of what the layer adds; `state_norm`, mean |x| behind it.
    """
    ids = torch.tensor([i for text in texts for i in tokenizer(text, verbose=False)["input_ids"]])
    rows = ids[: len(ids) // length * length].view(-1, length)
    blocks = find_blocks(model)
    sums = {layer: _Sums() for layer in blocks}
    handles = [
        handle
        for layer, found in blocks.items()
        for handle in (
            found.experts.register_forward_hook(sums[layer].heard),
            model.model.layers[layer].register_forward_hook(sums[layer].passed),
        )
    ]
    for batch in torch.split(rows, 16):
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    experts = int(model.config.num_local_experts)
    return [{"layer": layer, **each.figures(experts)} for layer, each in sums.items()]


class _Sums:
    def __init__(self) -> None:
        self.tokens, self.outputs, self.states = 0, 0.0, 0.0
        self.chosen: list[Tensor] = []

    def heard(self, _: nn.Module, args: tuple[Tensor, ...], made: Tensor) -> None:
        self.chosen.append(args[1].flatten())
        self.tokens += made.numel() // made.shape[-1]
        self.outputs += float(made.float().norm(dim=-1).sum())

    def passed(self, _: nn.Module, _args: Any, states: Tensor) -> None:
        self.states += float(hidden_of(states).float().norm(dim=-1).sum())

    def figures(self, experts: int) -> dict[str, float]:
        counts = torch.bincount(torch.cat(self.chosen), minlength=experts).double()
        shares = counts / counts.sum()
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum() / math.log(experts)
        return {
            "load_entropy": float(entropy),
            "load_largest": float(shares.max()) * experts,
            "output_norm": self.outputs / self.tokens,
            "state_norm": self.states / self.tokens,
        }
