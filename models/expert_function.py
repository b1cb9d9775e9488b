"""What an expert computes, written once, and the comparison with the family's own module.

gated, three matrices   f(x) = down (act(gate x + gate_bias) * (up x + up_bias)) + down_bias
plain, two matrices     f(x) = down act(up x + up_bias) + down_bias
GPT-OSS                 the gated form with both halves clamped and a gate of its own

A family whose experts compute something else is refused by numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import find_blocks
from models.classes import prepare_classes
from models.errors import CheckpointError
from models.expert import Expert
from models.moe import MoeCheckpoint

# (gate half or None, up half), each [T, I] -> [T, I]: what enters `down`.
Activation = Callable[[Tensor | None, Tensor], Tensor]
# Names that transformers' configs have for the activation of the experts, by precedence.
_KEYS = ("hidden_act", "hidden_activation", "activation_function", "hidden_act_fn")
# Of the largest output, in units of fp32's own rounding: another order of the same additions.
_TOLERANCE = 64


def activations(expert: Expert, x: Tensor, act: Activation) -> Tensor:
    """[T, H] -> [T, I]: what enters `down`, the activation of each neuron."""
    gate = None if expert.gate is None else F.linear(x, expert.gate, expert.gate_bias)
    return act(gate, F.linear(x, expert.up, expert.up_bias))


def output(expert: Expert, neurons: Tensor) -> Tensor:
    """[T, I] -> [T, H]: an expert's output from the activations of its neurons."""
    return F.linear(neurons, expert.down, expert.down_bias)


def activation(config: dict[str, Any]) -> Activation:
    """The nonlinearity that config.json leads to; silu where it names none.

    Raises:
        CheckpointError: it names one that transformers does not know.
    """
    from transformers.activations import ACT2FN

    if config.get("model_type") == "gpt_oss":
        return _clamped(config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702))
    name = next((config[key] for key in _KEYS if isinstance(config.get(key), str)), "silu")
    if name not in ACT2FN:
        raise CheckpointError(
            f"config.json names the activation {name!r}; known are {', '.join(sorted(ACT2FN))}",
            "set calibrate.sample.statistics=false",
        )
    act = ACT2FN[name]

    def gated(gate: Tensor | None, up: Tensor) -> Tensor:
        found: Tensor = act(up) if gate is None else act(gate) * up
        return found

    return gated


def _clamped(limit: float, alpha: float) -> Activation:
    """GPT-OSS (arXiv 2508.10925): (up + 1) gate sigmoid(alpha gate), after a clamp of both."""

    def gated(gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        gate = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)

    return gated


@torch.inference_mode()
def check_function(moe: MoeCheckpoint, layer: int, hidden: Tensor) -> None:
    """Compares the first expert of a layer with the family's own module, in fp32.

    Args:
        hidden: [T, H] inputs to compare on.

    Raises:
        CheckpointError: largest difference, and what was allowed.
    """
    x, expert = hidden.float(), moe.read_expert(layer, 0).map(Tensor.float)
    found = output(expert, activations(expert, x, activation(moe.checkpoint.config)))
    zeros, ones = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)
    expected = _single(moe, layer, expert)(x, zeros, ones)
    difference = float((found - expected).abs().max())
    largest = float(expected.abs().max())
    allowed = _TOLERANCE * torch.finfo(torch.float32).eps * largest
    # Written so that NaN on either side is refused.
    if not difference <= allowed:
        raise CheckpointError(
            f"experts of layer {layer} compute something else than down(act(gate x) * (up x)):"
            f" the outputs differ by {difference:.3g}, they are up to {largest:.3g},"
            f" {allowed:.3g} is allowed",
            f"{moe.family.model_type} is not supported here: set calibrate.sample.statistics=false",
        )


def _single(moe: MoeCheckpoint, layer: int, expert: Expert) -> nn.Module:
    """The family's module of routed experts with one expert alone, fp32, on the CPU.

    Raises:
        CheckpointError: its experts cannot be called with ids and gates.
    """
    storage = moe.family.memory_experts
    if storage is None:
        raise CheckpointError(
            f"experts of {moe.family.model_type} cannot be called on their own",
            "set calibrate.sample.statistics=false",
        )
    prepare_classes(moe.checkpoint.config)
    module: Any = copy.deepcopy(find_blocks(_skeleton(moe.checkpoint.folder))[layer].experts)
    for name, tensor in storage.pack([expert]).items():
        setattr(module, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    module.num_experts = 1
    single: nn.Module = module.eval()
    return single


@lru_cache(maxsize=1)
def _skeleton(folder: Any) -> Any:
    """The transformers model without memory; one is kept, since every layer asks for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
