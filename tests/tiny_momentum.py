"""Tiny random MomentumSMoE models."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from models.momentum.configuration_momentum import MomentumConfig
from models.momentum.modeling_momentum import MomentumForCausalLM
from models.momentum.registration import register
from tests.tiny import random_ids
from tests.tiny_families import COMMON

VARIANTS: dict[str, dict[str, Any]] = {
    "heavy_ball": {},
    "adam": {"momentum_kind": "adam"},
    "robust": {"momentum_kind": "robust"},
    "nag": {"momentum_kind": "nag"},
    "sign": {"momentum_kind": "sign", "gamma": 0.1},
    "complex": {"momentum_kind": "complex", "mu_imaginary": 0.1},
    "learnable": {"learnable_step": True},
}
STYLES = ("pre_ln", "post_ln")


def config(**fields: object) -> MomentumConfig:
    """Three layers of four experts, hidden size 32."""
    return MomentumConfig(**COMMON | fields)


def model(**fields: object) -> Any:
    """In eval mode; every tensor is random, the step of learnable ones too."""
    return filled(MomentumForCausalLM(config(**fields)))


def mixtral(**fields: object) -> Any:
    """A Mixtral with the same tensors as `model()`."""
    return filled(transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON | fields)))


@torch.no_grad()
def filled(made: Any) -> Any:
    """Random numbers that hang on a tensor's name only, not on which other tensors there are."""
    register()
    for name, stored in made.state_dict().items():
        generator = torch.Generator().manual_seed(sum(name.encode()) * 7919)
        noise = torch.randn(stored.shape, generator=generator)
        norm = "norm" in name or name.endswith("gamma")
        stored.copy_(1 + 0.1 * noise if norm else 0.2 * noise)
    return made.eval()


@torch.inference_mode()
def logits(made: Any, rows: int = 2, length: int = 9) -> Tensor:
    """`[B, S, V]` of the same rows of tokens."""
    found: Tensor = made(input_ids=random_ids(rows, length), use_cache=False).logits
    return found
