"""The architecture, the training loss, and saving in the public checkpoint format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MixtralConfig, MixtralForCausalLM

import fast_experts
from fused_loss import fused_cross_entropy
from models.momentum.configuration_momentum import MomentumConfig
from models.momentum.modeling_momentum import MomentumForCausalLM


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars of one batch."""

    cross_entropy: Tensor
    balance: Tensor


def make_config() -> MixtralConfig:
    """Five layers of 16 experts, top-2: 5.7 M parameters, of which 1.9 M work on a token."""
    return MixtralConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_local_experts=16,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def make_momentum_config(**fields: Any) -> MomentumConfig:
    """The same architecture with momentum; `fields` replace or add keys of its config."""
    shared = make_config().to_diff_dict()
    shared.pop("model_type")
    return MomentumConfig(**shared | fields)


def class_of(config: MixtralConfig) -> type[MixtralForCausalLM]:
    """What a config makes; momentum models and other families are trained by the same code."""
    if isinstance(config, MomentumConfig):
        return MomentumForCausalLM
    found: type[MixtralForCausalLM] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found


def build(config: MixtralConfig, seed: int) -> MixtralForCausalLM:
    """A freshly initialised fp32 model that runs its experts with the fast training forward."""
    fast_experts.register()
    torch.manual_seed(seed)
    model = class_of(config)(config)
    model.set_experts_implementation(fast_experts.IMPLEMENTATION)
    return model.train()


def as_it_is(values: Tensor) -> Tensor:
    """What stands for a mean over ranks where there is one."""
    return values


def balance_loss(
    router_logits: tuple[Tensor, ...],
    top_k: int,
    averaged: Callable[[Tensor], Tensor] = as_it_is,
) -> Tensor:
    """Switch-style balance loss per layer, averaged over layers; 1 means perfectly uniform.

    transformers pools all layers before multiplying, which lets one layer's imbalance hide behind
    another's; a mean of per-layer losses keeps every expert of every layer alive. Shares have no
    gradient and are `averaged` over ranks, so that the ranks' losses have the mean of all tokens.
    """
    per_layer = []
    for logits in router_logits:  # [T, E]
        probabilities = logits.float().softmax(-1)
        experts = logits.shape[-1]
        chosen = probabilities.topk(top_k, dim=-1).indices.reshape(-1)
        share = averaged(torch.bincount(chosen, minlength=experts) / chosen.numel())  # [E]
        per_layer.append(experts * (share * probabilities.mean(0)).sum())
    return torch.stack(per_layer).mean()


def compute_losses(
    model: MixtralForCausalLM,
    tokens: Tensor,
    averaged: Callable[[Tensor], Tensor] = as_it_is,
) -> Losses:
    """Losses of a batch of token windows [B, S + 1]; of a rank's share of one with `averaged`.

    Weights stay fp32 for the optimiser and are cast to bf16 for the matmuls, as they will be in the
    saved file. Embedding rows are gathered in fp32, since bf16 sums over repeated tokens are lossy.
    """
    table = model.get_parameter("model.embed_tokens.weight")  # [V, H]
    embedded = nn.functional.embedding(tokens[:, :-1], table).bfloat16()
    weights = {name: weight.bfloat16() for name, weight in model.model.named_parameters()}
    kwargs = {"inputs_embeds": embedded, "use_cache": False, "output_router_logits": True}
    output = functional_call(model.model, weights, kwargs=kwargs)
    hidden = output.last_hidden_state.flatten(0, 1)  # [B * S, H]
    loss = fused_cross_entropy(hidden, table, tokens[:, 1:].flatten())
    top_k = model.config.num_experts_per_tok
    return Losses(loss, balance_loss(output.router_logits, top_k, averaged))


def save(model: MixtralForCausalLM, out: Path) -> None:
    """Write bf16 safetensors and a config that plain transformers opens."""
    config = type(model.config)(**model.config.to_dict())
    copy = type(model)(config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(out)
