"""Tiny random checkpoints of every supported family, with planted copies of experts.

The planting and the indexing of experts work on the model in memory, so that what they expect of
checkpoints owes nothing to the code that reads and writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from models.blocks import find_blocks
from tests import tiny_families
from tests.tiny import random_ids, random_permutation

EXPERTS, KEPT = 8, 4
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "SwitchTransformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "router_bias": True,
        "decoder_start_token_id": 0,
    },
    "NllbMoe": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 20,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "decoder_start_token_id": 0,
    },
}
_SEQ2SEQ = {"vocab_size": 64, "num_experts": EXPERTS, "pad_token_id": 0, "eos_token_id": None}


def tiny_config(stem: str, **overrides: object) -> Any:
    """A config with 8 experts; `stem` is the beginning of the family's class names."""
    if stem in _ENCODER_DECODERS:
        fields = _SEQ2SEQ | _ENCODER_DECODERS[stem]
    else:
        fields = tiny_families.COMMON | tiny_families.FAMILIES[stem]
        fields |= dict.fromkeys(set(_COUNTS) & set(fields), EXPERTS)
    return tiny_families.family_class(stem, "Config")(**fields | overrides)


STEMS = {
    tiny_config(stem).model_type: stem for stem in [*tiny_families.FAMILIES, *_ENCODER_DECODERS]
}


def tiny_model(model_type: str, **overrides: object) -> Any:
    """A random model in eval mode, whose every tensor is random (biases start at zero)."""
    torch.manual_seed(3)
    config = tiny_config(STEMS[model_type], **overrides)
    suffix = "ForConditionalGeneration" if config.is_encoder_decoder else "ForCausalLM"
    model = tiny_families.family_class(STEMS[model_type], suffix)(config).eval()
    with torch.no_grad():
        for stored in model.state_dict().values():
            stored.add_(torch.randn_like(stored), alpha=0.05)
    return model


def planted_model(model_type: str, **overrides: object) -> Any:
    """A model in which experts 2i and 2i+1 are one, its neurons in another order."""
    model = tiny_model(model_type, **overrides)
    for layer, block in find_blocks(model).items():
        for first in range(0, EXPERTS, 2):
            _copy_permuted(block.experts, first, first + 1, seed=100 * layer + first)
    return model


@torch.no_grad()
def _copy_permuted(experts: Any, source: int, target: int, seed: int) -> None:
    if isinstance(experts, nn.ModuleDict):
        ours, theirs = experts[f"expert_{source}"], experts[f"expert_{target}"]
        first, second = (ours.wi, ours.wo) if hasattr(ours, "wi") else (ours.fc1, ours.fc2)
        order = random_permutation(first.weight.shape[0], seed)
        into, out = (theirs.wi, theirs.wo) if hasattr(theirs, "wi") else (theirs.fc1, theirs.fc2)
        into.weight.copy_(first.weight[order])
        out.weight.copy_(second.weight[:, order])
        if into.bias is not None:
            into.bias.copy_(first.bias[order])
            out.bias.copy_(second.bias)
        return
    biased = hasattr(experts, "gate_up_proj_bias")  # then transposed and interleaved as well
    width = experts.gate_up_proj.shape[-1 if biased else 1] // 2
    order = random_permutation(width, seed)
    if biased:
        both = torch.stack([2 * order, 2 * order + 1], dim=1).flatten()
        experts.gate_up_proj[target] = experts.gate_up_proj[source][:, both]
        experts.gate_up_proj_bias[target] = experts.gate_up_proj_bias[source][both]
        experts.down_proj[target] = experts.down_proj[source][order]
        experts.down_proj_bias[target] = experts.down_proj_bias[source]
    else:
        both = torch.cat([order, width + order])
        experts.gate_up_proj[target] = experts.gate_up_proj[source][both]
        experts.down_proj[target] = experts.down_proj[source][:, order]


def open_family(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The checkpoint as transformers opens it, and what it says about missing tensors."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind: Any = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    return model.eval(), info


@torch.inference_mode()
def outputs(model: Any) -> Tensor:
    """Logits for the same two rows of tokens."""
    ids = random_ids(2, 9)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=ids, use_cache=False, **decoder).logits
    return found


def with_experts(model: Any, kept: Sequence[int]) -> dict[str, Tensor]:
    """The model's tensors with the given experts only, wherever one has an entry per expert."""
    state = dict(model.state_dict())
    names = {id(module): name for name, module in model.named_modules()}
    for block in find_blocks(model).values():
        prefix = f"{names[id(block.block)]}."
        if isinstance(block.experts, nn.ModuleDict):
            _renumber(state, f"{prefix}experts.expert_", kept)
        for name in [n for n in state if n.startswith(prefix)]:
            routed = name.startswith((f"{prefix}experts.", f"{prefix}router.", f"{prefix}gate."))
            beside = "." not in name.removeprefix(prefix)  # a bias in the block itself
            if not (routed or beside) or "expert_" in name.removeprefix(f"{prefix}expert_bias"):
                continue
            axis = list(state[name].shape).index(EXPERTS)
            state[name] = state[name].index_select(axis, torch.tensor(list(kept)))
    return state


def _renumber(state: dict[str, Tensor], start: str, kept: Sequence[int]) -> None:
    found = {name: state.pop(name) for name in list(state) if name.startswith(start)}
    for name, tensor in found.items():
        number, _, rest = name.removeprefix(start).partition(".")
        if int(number) in kept:
            state[f"{start}{list(kept).index(int(number))}.{rest}"] = tensor
