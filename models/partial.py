"""A transformers model with a range of its experts only, read tensor by tensor.

The whole model never exists: it is built without memory, and of the weight files only the dense
part and the named experts are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.errors import CheckpointError
from models.moe import MoeCheckpoint

_TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def load_part(moe: MoeCheckpoint, experts: range, dtype: str) -> Any:
    """A causal LM in eval mode on the CPU whose MoE blocks hold `experts` alone.

    Its `experts` modules count from zero and cannot answer for the experts that are absent: wrap
    them before the model is run. Routers and everything dense are whole.

    Args:
        experts: ids in every layer; all of them give the model that `from_pretrained` opens.
        dtype: `auto` (as the config says, else as stored), `float32`, `bfloat16` or `float16`.

    Raises:
        CheckpointError: the files lack a tensor that the model has.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(moe.checkpoint.folder, local_files_only=True)
    kind = resident_type(moe, config, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=kind)
    for layer in moe.layers:
        _narrow(experts_module(moe, model, layer), len(experts))
    _assign(moe, model, None, kind)
    for layer in range(len(model.model.layers)):
        _assign(moe, model, layer, kind)
        if layer in moe.layers:
            found = read_fused(moe, layer, experts, kind)
            experts_module(moe, model, layer).load_state_dict(found, assign=True)
    model.tie_weights()
    _restore_buffers(model)
    _refuse_empty(moe, model)
    return model.eval().requires_grad_(False)


def experts_module(moe: MoeCheckpoint, model: Any, layer: int) -> Any:
    """The family's own module of routed experts in a decoder layer."""
    return model.get_submodule(f"model.layers.{layer}.{moe.family.memory_block}.experts")


def read_fused(
    moe: MoeCheckpoint, layer: int, experts: range, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Experts of one layer as transformers holds them.

    Returns:
        `gate_up_proj` `[len(experts), 2I, H]` (gate rows first), `down_proj` `[.., H, I]`.
    """
    width, hidden = moe.expert_infos(layer)["up"].shape
    gate_up = torch.empty(len(experts), 2 * width, hidden, dtype=dtype)
    down = torch.empty(len(experts), hidden, width, dtype=dtype)
    for index, each in enumerate(experts):
        # One expert at a time: the peak is the finished tensor and one expert.
        expert = moe.read_expert(layer, each)
        assert expert.gate is not None
        gate_up[index, :width], gate_up[index, width:] = expert.gate, expert.up
        down[index] = expert.down
    return {"gate_up_proj": gate_up, "down_proj": down}


def resident_type(moe: MoeCheckpoint, config: Any, dtype: str) -> torch.dtype:
    """The type that `from_pretrained(dtype=...)` would choose."""
    if dtype != "auto":
        found = getattr(torch, dtype)
    else:
        stored = _TORCH_TYPES[moe.expert_infos(moe.layers[0])["up"].dtype]
        found = getattr(config, "dtype", None) or stored
    assert isinstance(found, torch.dtype)
    return found


def _narrow(experts: Any, count: int) -> None:
    """Leaves room for `count` experts; still without memory."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(parameter[:count], requires_grad=False))
    experts.num_experts = count


def _assign(moe: MoeCheckpoint, model: Any, layer: int | None, dtype: torch.dtype) -> None:
    """Reads what is dense in a layer, or outside all layers, and its router."""
    names = moe.dense_names(layer)
    if layer in moe.layers:
        assert layer is not None
        names.append(moe.family.router_name(layer))
    found = {
        moe.family.memory_name(name): tensor.to(dtype)
        for name, tensor in moe.checkpoint.read(names).items()
    }
    model.load_state_dict(found, strict=False, assign=True)


def _restore_buffers(model: Any) -> None:
    """Buffers that no file holds (rotary frequencies) are computed anew, as transformers does."""
    for module in model.modules():
        empty = [name for name, b in module.named_buffers(recurse=False) if b.is_meta]
        for name in empty:
            module.register_buffer(
                name, torch.empty_like(module.get_buffer(name), device="cpu"), persistent=False
            )
        if empty:
            model._init_weights(module)


def _refuse_empty(moe: MoeCheckpoint, model: Any) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{len(empty)} tensor(s) of the model are not in {moe.checkpoint.folder},"
            f" first {empty[0]}",
            "download the checkpoint again",
        )
