"""Bytes of the output, known before a weight is read: the format's own code on meta tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import FLOAT_NAMES
from models.factored import AnyExpert
from models.moe import MoeCheckpoint
from stages.compress.layer import applies, compress
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.export.formats.mapped import kept_expert
from stages.group.budget import Sizes
from stages.group.decision import LayerDecision, from_labels
from stages.group.width import Widths

_NAMES = {getattr(torch, name): short for short, name in FLOAT_NAMES.items()} | {torch.int64: "I64"}
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
    numbers = {moe.family.layer_of(name) for name in moe.checkpoint.tensors}
    layers = sorted(layer for layer in numbers if layer is not None)
    return [_file(moe, layer, by_layer.get(layer), config) for layer in layers] + [
        _file(moe, None, None, config)
    ]


def sizes(moe: MoeCheckpoint, config: ExportConfig, kept: int | None = None) -> Sizes:
    """What a budget in bytes is made of, measured on two ends: all experts, and one step fewer.

    Args:
        kept: experts per layer whose width is asked for; None: all.
    """
    step = router_groups(moe, config)
    full = _total(moe, moe.num_experts, config)
    less = _total(moe, moe.num_experts - step, config)
    layers = len(moe.layers)
    per_expert = (full - less) // (layers * step)
    fixed = full - per_expert * moe.num_experts * layers
    kept = moe.num_experts if kept is None else kept
    return Sizes(fixed, max(per_expert, 1), layers, widths(moe, _total(moe, kept, config), kept))


def widths(moe: MoeCheckpoint, full: int, kept: int) -> Widths:
    """Bytes by the width of `kept` experts; `full` is the size of the files at full width."""
    neurons = min(moe.meta_expert(layer).neurons for layer in moe.layers)
    rows = [moe.meta_expert(layer) for layer in moe.layers]
    one = torch.arange(1, device="meta")
    shrinks = [
        t for each in rows for n, t in each.select(one).tensors().items() if n != "down_bias"
    ]
    per_neuron = kept * sum(tensor.nbytes for tensor in shrinks)
    return Widths(neurons, full - neurons * per_neuron, per_neuron, kept)


def placeholder(moe: MoeCheckpoint, kept: Mapping[int, int]) -> list[LayerDecision]:
    """Decisions with the right counts, for sizes that are needed before statistics exist."""
    return [
        from_labels(layer, _spread(moe, kept[layer]), [1.0] * moe.num_experts)
        for layer in moe.layers
    ]


def router_groups(moe: MoeCheckpoint, config: ExportConfig) -> int:
    """Parts of a layer that must keep equal numbers of experts: the native router's groups."""
    return moe.router_groups if config.format == "native" else 1


def _spread(moe: MoeCheckpoint, kept: int) -> list[int | None]:
    """A representative for every expert; as many in every router group if that is possible."""
    groups = moe.router_groups if kept % moe.router_groups == 0 else 1
    size, each = moe.num_experts // groups, kept // groups
    return [e // size * size + min(e % size, each - 1) for e in range(moe.num_experts)]


def _total(moe: MoeCheckpoint, kept: int, config: ExportConfig) -> int:
    decisions = placeholder(moe, dict.fromkeys(moe.layers, kept))
    return sum(layout.file_bytes for layout in file_layouts(moe, decisions, config))


def _file(
    moe: MoeCheckpoint, layer: int | None, decision: LayerDecision | None, config: ExportConfig
) -> FileLayout:
    form = FORMATS[config.format]
    infos = moe.checkpoint.tensors
    tensors = {form.dense_name(moe, n): infos[n].meta() for n in moe.dense_names(layer)}
    if decision is not None:
        merged = [_meta_expert(moe, decision, config)] * len(decision.representatives)
        routers = {name: infos[name].meta() for name in moe.router_names(decision.layer)}
        tensors |= form.layer_tensors(moe, decision, merged, routers, config)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    floats = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    return FileLayout(layer, nbytes, nbytes + _header_bytes(tensors), floats)


def _meta_expert(moe: MoeCheckpoint, decision: LayerDecision, config: ExportConfig) -> AnyExpert:
    expert = kept_expert(moe, decision)
    if config.compress is None or not applies(config.compress, decision.layer):
        return expert
    return compress(expert, config.compress, decision.layer)


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
