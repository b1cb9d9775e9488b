"""What else experts could be grouped by than router logits (the paper's table 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paper.cells import Similarity
from models.blocks import find_blocks
from models.expert_function import activations, output
from models.moe import MoeCheckpoint
from stages.group.decision import LayerDecision, from_labels

Array = np.ndarray[Any, Any]
COMPARED = 512  # tokens that all experts are run on


def regrouped(
    decisions: Sequence[LayerDecision],
    kind: Similarity,
    moe: MoeCheckpoint,
    inputs: Mapping[int, Tensor],
    seed: int,
) -> list[LayerDecision]:
    """The same dominant experts; all others join the one that is most alike by `kind`.

    Args:
        inputs: layer -> [T, H] what enters it.
    """
    if kind == "router logits":
        return list(decisions)
    found = []
    for decision in decisions:
        alike = _alike(kind, moe, decision.layer, inputs[decision.layer], seed)
        centres = np.array(decision.representatives)
        labels = centres[alike[:, centres].argmax(axis=1)]
        labels[centres] = centres
        found.append(from_labels(decision.layer, labels.tolist(), decision.weight))
    return found


def _alike(kind: Similarity, moe: MoeCheckpoint, layer: int, x: Tensor, seed: int) -> Array:
    """[E, E] cosines, or chance."""
    if kind == "random":
        chance: Array = np.random.default_rng([seed, layer]).random((moe.num_experts,) * 2)
        return chance
    rows = _rows(kind, moe, layer, x)
    cosines: Array = (F.normalize(rows) @ F.normalize(rows).T).numpy()
    return cosines


@torch.inference_mode()
def _rows(kind: Similarity, moe: MoeCheckpoint, layer: int, x: Tensor) -> Tensor:
    """[E, ...] what stands for each expert."""
    if kind == "router weight":
        return moe.read_router(layer).float()
    experts = [
        expert.map(Tensor.float) for expert in moe.read_experts(layer, range(moe.num_experts))
    ]
    if kind == "expert weight":
        return torch.stack(
            [torch.cat([t.flatten() for t in e.tensors().values()]) for e in experts]
        )

    def act(gate: Tensor | None, up: Tensor) -> Tensor:
        return up.relu() if gate is None else F.silu(gate) * up

    return torch.stack([output(e, activations(e, x, act)).flatten() for e in experts])


@torch.inference_mode()
def inputs_of(model: Any, sources: Tensor, targets: Tensor) -> dict[int, Tensor]:
    """Layer -> [T, H] fp32 what enters its MoE block along some text."""
    found: dict[int, Tensor] = {}
    hooks = [
        block.block.register_forward_pre_hook(
            lambda _, args, layer=layer: found.update({layer: args[0].flatten(0, -2).float()})
        )
        for layer, block in find_blocks(model).items()
    ]
    if model.config.is_encoder_decoder:
        model(input_ids=sources, labels=targets, use_cache=False)
    else:
        model(input_ids=torch.cat([sources, targets], dim=1), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {layer: x[:COMPARED] for layer, x in found.items()}
