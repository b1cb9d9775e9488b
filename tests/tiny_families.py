"""Tiny random models of every decoder family that is observed, streamed and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from models.momentum.configuration_momentum import MomentumConfig
from models.momentum.modeling_momentum import MomentumForCausalLM
from models.momentum.registration import register
from tests.tiny import random_ids

VOCABULARY, HIDDEN, EXPERTS, LENGTHS = 64, 32, 4, (9, 4, 1, 7)
# What every family is given, under whatever names it knows; the rest is dropped by its config.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
# Class -> what is particular to the family.
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"sliding_window": 5},
    "Qwen2Moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 20},
    "Qwen3Moe": {"num_experts": EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": True},
    "Qwen3Next": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 20, **_LINEAR},
    "Olmoe": {"num_experts": EXPERTS, "tie_word_embeddings": True},
    "DeepseekV2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "DeepseekV3": _LATENT,
    "Glm4Moe": {"n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "GraniteMoe": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "GptOss": {"sliding_window": 5},
    "Phimoe": {"sliding_window": 5},
    "Ernie4_5_Moe": {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_layer_start_index": 1},
    "HunYuanMoEV1": {"num_experts": EXPERTS, "moe_topk": 2},
    "Jamba": {
        "num_experts": EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
    },
    "MiniMax": {"block_size": 4},
    "MiniMaxM2": {},
    "Afmoe": {"num_experts": EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1},
    "Momentum": {
        "block_style": "post_ln",
        "momentum_kind": "complex",
        "mu_imaginary": 0.1,
        "learnable_step": True,
        "dense_layers": [1],
    },
    "Lfm2Moe": {
        "num_experts": EXPERTS,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
}


def family_class(name: str, kind: str) -> Any:
    """`MixtralConfig`, `MixtralForCausalLM` and the like."""
    if name == "Momentum":
        register()
        return {"Config": MomentumConfig, "ForCausalLM": MomentumForCausalLM}[kind]
    return getattr(transformers, f"{name}{kind}")


def family_model(name: str) -> Any:
    """A tiny random model of a family in eval mode."""
    torch.manual_seed(3)
    config = family_class(name, "Config")(**COMMON | FAMILIES[name])
    model = family_class(name, "ForCausalLM")(config).eval()
    with torch.no_grad():
        for stored in model.state_dict().values():  # some start at zero or one throughout
            stored.add_(torch.randn_like(stored), alpha=0.05)
    return model


def save_family(folder: Path, name: str) -> Path:
    """A tiny random checkpoint of a family, as `save_pretrained` writes it."""
    family_model(name).save_pretrained(folder)
    return folder


def ragged() -> dict[str, Tensor]:
    """[B, S] ids and mask of rows of different lengths, padded on the left."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS) + 2, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, length in enumerate(LENGTHS):
        ids[i, -length:], mask[i, -length:] = random_ids(1, length, i)[0], True
    return {"input_ids": ids, "attention_mask": mask}
