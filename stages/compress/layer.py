"""All experts of one layer as U V + S, and what the sample says about each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.expert import Expert
from models.expert_function import Activation, activations
from models.factored import Factored, FactoredExpert
from stages.compress.config import CompressConfig
from stages.compress.factor import Shape, factor, shape_of
from stages.compress.lowrank import at_least_fp32, residual
from stages.compress.sparse import cut
from stages.refit.usage import Usage


@dataclass(frozen=True)
class Seen:
    """The sampled inputs of a layer, and which of its kept experts they go to."""

    hidden: Tensor  # [N, H] fp32
    use: Sequence[Usage]  # one per kept expert
    act: Activation


def applies(config: CompressConfig | None, layer: int) -> bool:
    """Whether the experts of this layer are decomposed."""
    return config is not None and layer not in config.skip_layers


def shapes(expert: Expert, config: CompressConfig, layer: int) -> dict[str, Shape]:
    """Field of `Expert` -> what its matrix becomes in this layer."""
    found = {}
    for name in names(expert):
        height, width = getattr(expert, name).shape
        found[name] = shape_of(config, height, width, config.kept(layer, name))
    return found


def compress(expert: Expert, config: CompressConfig, layer: int = 0) -> FactoredExpert:
    """One expert from its weights alone; on the meta device, the shapes of any."""
    kept = {name: config.kept(layer, name) for name in names(expert)}
    found = {n: factor(getattr(expert, n), config, None, kept[n]) for n in names(expert)}
    return _assembled(expert, found)


@torch.inference_mode()
def compress_layer(
    experts: Sequence[Expert], config: CompressConfig, seen: Seen | None = None, layer: int = 0
) -> list[FactoredExpert]:
    """Every expert of a layer; `seen` where whitening or importance ask for it, `layer` where the
    numbers of rows were decided."""
    if seen is None:
        return [compress(expert, config, layer) for expert in experts]

    def one(weight: Tensor, name: str, inputs: Tensor) -> Factored:
        return factor(weight, config, inputs, config.kept(layer, name))

    pairs = zip(experts, seen.use, strict=True)
    return [_assembled(expert, in_turn(expert, seen, use, one)) for expert, use in pairs]


@torch.inference_mode()
def with_all_rows(expert: Expert, made: FactoredExpert) -> FactoredExpert:
    """The decomposed expert with all rows (or columns) of S: the function of the whole one."""
    found = {}
    for name, each in made.matrices().items():
        left, right = at_least_fp32(each.left), at_least_fp32(each.right)
        rest = residual(getattr(expert, name), left, right)
        index = torch.arange(rest.shape[0 if each.axis == "rows" else 1])
        kept = cut(rest, each.axis, index).to(each.left.dtype).contiguous()
        found[name] = Factored(each.left, each.right, index, kept, each.axis)
    return _assembled(expert, found)


def in_turn(
    expert: Expert, seen: Seen, use: Usage, make: Callable[[Tensor, str, Tensor], Factored]
) -> dict[str, Factored]:
    """Matrix -> what `make(weight, name, inputs)` gives on the sampled inputs times their gates;
    the down projection on what the decomposed gate and up give it."""
    x, gates = seen.hidden[use.tokens], use.gates.float()[:, None]
    first = [name for name in names(expert) if name != "down"]
    found = {name: make(getattr(expert, name), name, x * gates) for name in first}
    halves = {name: each.dense() for name, each in found.items()}
    made = Expert(**halves, down=expert.down, **_biases(expert)).map(at_least_fp32)
    neurons = activations(made, x, seen.act)
    return found | {"down": make(expert.down, "down", neurons * gates)}


def errors(experts: Sequence[Expert], made: Sequence[FactoredExpert]) -> dict[str, Any]:
    """Field -> |W - (U V + S)|^2 / |W|^2 over all experts of the layer."""
    found = {}
    for name in names(experts[0]):
        lost = energy = 0.0
        for expert, each in zip(experts, made, strict=True):
            whole = getattr(expert, name).double()
            lost += float((whole - each.matrices()[name].dense().double()).square().sum())
            energy += float(whole.square().sum())
        found[name] = lost / max(energy, 1e-300)
    return {"compress_error": found}


def names(expert: Expert) -> list[str]:
    """Fields of its matrices."""
    return [name for name in expert.tensors() if not name.endswith("_bias")]


def _biases(expert: Expert) -> dict[str, Tensor]:
    return {name: t for name, t in expert.tensors().items() if name.endswith("_bias")}


def _assembled(expert: Expert, found: dict[str, Factored]) -> FactoredExpert:
    return FactoredExpert(
        up=found["up"], down=found["down"], gate=found.get("gate"), rest=_biases(expert)
    )
