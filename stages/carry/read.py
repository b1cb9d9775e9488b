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
