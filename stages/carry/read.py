"""What was carried, as a layer's sample: drifted inputs, their routing, and the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stages.errors import StatisticsError
from stages.inputs.read import LayerInputs


def carried(inputs: LayerInputs, parts: Sequence[Path]) -> tuple[LayerInputs, Tensor]:
    """The same tokens on the compressed stream, and the [N, H] target of their experts' sum.

    The router's logits stay those of the original stream; no refit reads them.

    Raises:
        StatisticsError: a part is missing, damaged, or of another sample.
    """
    from safetensors import SafetensorError, safe_open

    names = {kind: f"{inputs.layer}.{kind}" for kind in ("hidden", "ids", "gates", "target")}
    found: dict[str, list[Tensor]] = {kind: [] for kind in names}
    for path in parts:
        try:
            with safe_open(path, framework="pt") as handle:
                for kind, name in names.items():
                    found[kind].append(handle.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise StatisticsError(f"cannot read carried inputs from {path}: {error}") from error
    joined = {kind: torch.cat(tensors) for kind, tensors in found.items()}
    target = joined.pop("target")
    if len(target) != len(inputs):
        raise StatisticsError(f"{len(target)} tokens were carried, the sample has {len(inputs)}")
    hidden, ids, gates = (joined[kind] for kind in ("hidden", "ids", "gates"))
    return replace(inputs, hidden=hidden, ids=ids, gates=gates), target


def behind(layer: int, parts: Sequence[Path]) -> tuple[Tensor, float] | None:
    """The original residual stream [N, H] behind the model's last layer at the same tokens, and
    what that layer multiplies its experts' sum with; None: no such stream was carried.

    Raises:
        StatisticsError: a part is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    streams, factors = [], []
    for path in parts:
        try:
            with safe_open(path, framework="pt") as handle:
                if f"{layer}.stream" not in set(handle.keys()):
                    return None
                streams.append(handle.get_tensor(f"{layer}.stream"))
                factors.append(float(handle.get_tensor(f"{layer}.factor")))
        except (OSError, SafetensorError) as error:
            raise StatisticsError(f"cannot read carried streams from {path}: {error}") from error
    return torch.cat(streams), factors[0]
