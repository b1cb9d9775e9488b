"""The control: a layer learned anew from the calibration sample, on random features.

Gate and up projections are Gaussian, of the same number, width and scale as those that a method
would keep; down projections start from nothing and are fitted as every refit fits them. How close
this comes to a method's refit says how much of that refit is relearning.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.atomic import staged
from models.expert import Expert
from stages.export.formats import FORMATS
from stages.transform.stage import TransformUnit, reduce_layer


def write_random_layer(unit: TransformUnit, seed: int) -> dict[str, Any]:
    """In place of `stages.transform.stage.run_one`, for a unit with a decision."""
    decision = unit.decision
    assert decision is not None
    form, moe = FORMATS[unit.export.format], unit.moe
    generator = torch.Generator().manual_seed(seed * 1000 + decision.layer)
    kept = moe.read_experts(decision.layer, list(decision.representatives))
    merged = [random_expert(expert, decision.width, generator) for expert in kept]
    routers = moe.checkpoint.read(moe.router_names(decision.layer))
    reduction = reduce_layer(unit, decision, merged, routers)
    dense = moe.checkpoint.read(moe.dense_names(unit.layer))
    tensors = {form.dense_name(moe, name): tensor for name, tensor in dense.items()}
    tensors |= form.layer_tensors(moe, decision, reduction.experts, routers, unit.export)
    with staged(unit.output) as path:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata={"format": "pt"})
    return reduction.facts


def random_expert(like: Expert, width: int | None, generator: torch.Generator) -> Expert:
    """Gaussian inputs of the same root mean square, `width` neurons (None: as many), no output."""
    neurons = like.neurons if width is None else width
    cut = like.select(torch.arange(neurons))

    def drawn(tensor: Tensor) -> Tensor:
        scale = tensor.float().square().mean().sqrt()
        return (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)

    made = {name: drawn(tensor) for name, tensor in cut.tensors().items()}
    return Expert(**(made | {"down": torch.zeros_like(cut.down)}))
