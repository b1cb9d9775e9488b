"""Bytes of the output, known before a weight is read: the format's own code on meta tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.expert import Expert
from models.families import layer_of
from models.moe import MoeCheckpoint
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.group.budget import Sizes
from stages.group.decision import LayerDecision, from_labels

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64"}
_BY_ALIGNMENT = ("I64", "F64", "F32", "BF16", "F16", "U8")


@dataclass(frozen=True)
class FileLayout:
    """One output file: decoder layer (None: the tensors outside all layers) and its bytes."""

    layer: int | None
    tensor_bytes: int
    file_bytes: int
    parameters: int


def file_layouts(
    moe: MoeCheckpoint, decisions: Sequence[LayerDecision], config: ExportConfig
) -> list[FileLayout]:
    """Layouts of all output files, decoder layers first, in order."""
    by_layer = {decision.layer: decision for decision in decisions}
    layers = sorted({layer for n in moe.checkpoint.tensors if (layer := layer_of(n)) is not None})
    return [_file(moe, layer, by_layer.get(layer), config) for layer in layers] + [
        _file(moe, None, None, config)
    ]


def sizes(moe: MoeCheckpoint, config: ExportConfig) -> Sizes:
    """What a budget in bytes is made of, measured on the two ends: all experts, and one fewer."""
    full = _total(moe, moe.num_experts, config)
    less = _total(moe, moe.num_experts - 1, config)
    layers = len(moe.layers)
    per_expert = (full - less) // layers
    return Sizes(full - per_expert * moe.num_experts * layers, max(per_expert, 1), layers)


def placeholder(moe: MoeCheckpoint, kept: Mapping[int, int]) -> list[LayerDecision]:
    """Decisions with the right counts, for sizes that are needed before statistics exist."""
    return [
        from_labels(
            layer,
            [min(expert, kept[layer] - 1) for expert in range(moe.num_experts)],
            [1.0] * moe.num_experts,
        )
        for layer in moe.layers
    ]


def _total(moe: MoeCheckpoint, kept: int, config: ExportConfig) -> int:
    decisions = placeholder(moe, dict.fromkeys(moe.layers, kept))
    return sum(layout.file_bytes for layout in file_layouts(moe, decisions, config))


def _file(
    moe: MoeCheckpoint, layer: int | None, decision: LayerDecision | None, config: ExportConfig
) -> FileLayout:
    form = FORMATS[config.format]
    tensors = {form.dense_name(moe, n): _meta(moe, n) for n in moe.dense_names(layer)}
    if decision is not None:
        merged = [_meta_expert(moe, decision.layer)] * len(decision.representatives)
        router = _meta(moe, moe.family.router_name(decision.layer))
        made = form.layer_tensors(moe, decision, merged, router, config)
        tensors |= made
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    floats = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    return FileLayout(layer, nbytes, nbytes + _header_bytes(tensors), floats)


def _meta(moe: MoeCheckpoint, name: str) -> Tensor:
    info = moe.checkpoint.tensors[name]
    dtype = DTYPES.get(info.dtype, torch.uint8)
    shape = info.shape if info.dtype in DTYPES else (info.nbytes,)
    return torch.empty(shape, dtype=dtype, device="meta")


def _meta_expert(moe: MoeCheckpoint, layer: int) -> Expert:
    names = moe.family.expert_tensor_names(layer, 0)
    return Expert(**{part: _meta(moe, name) for part, name in names.items()})


def _header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Length prefix and JSON header as the safetensors library writes them, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=_stored_order):
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES.get(tensor.dtype, "U8"),
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


def _stored_order(item: tuple[str, Tensor]) -> tuple[int, str]:
    """Widest alignment first, then by name; the digits of the offsets depend on it."""
    name, tensor = item
    return _BY_ALIGNMENT.index(_NAMES.get(tensor.dtype, "U8")), name
