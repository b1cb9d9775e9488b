"""How often each expert of a live model is chosen, seen where the experts are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.blocks import find_blocks


class Counting:
    """Within the context: layer -> how often each expert was chosen in the last pass."""

    def __init__(self, model: Any) -> None:
        self._blocks = find_blocks(model)

    def __enter__(self) -> dict[int, Tensor]:
        counts: dict[int, Tensor] = {}
        self._hooks = [
            block.experts.register_forward_pre_hook(
                lambda module, args, layer=layer: counts.update(
                    {layer: torch.bincount(args[1].reshape(-1), minlength=module.num_experts)}
                )
            )
            for layer, block in self._blocks.items()
        ]
        return counts

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
