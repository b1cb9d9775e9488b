"""What a shard keeps of the sampled tokens: the input of every MoE block and how it was routed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.observer import Routed
from stages.calibrate.sample import Sample
from stages.corpus.blocks import Batch

KINDS = ("hidden", "ids", "gates", "logits")


class SampledInputs:
    """Gathers batch by batch; every token of the sample that passes is kept once per layer."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        # Layer -> (first token's place in the sample, tensors of the tokens of one batch).
        self._parts: dict[int, list[tuple[int, dict[str, Tensor]]]] = {}

    def add(self, batch: Batch, seen: Mapping[int, Routed]) -> None:
        """Picks the sampled tokens of one batch. Batches may come in any order."""
        stop = batch.start + len(batch.blocks)
        wanted = self._sample.within(batch.start, stop)
        rows = _rows(batch, self._sample.block[wanted], self._sample.position[wanted])
        for layer, routed in seen.items():
            parts = self._parts.setdefault(layer, [])
            if len(rows) or not parts:  # without rows: once, for the shapes
                parts.append((wanted.start, _picked(routed, rows)))

    def extend(self, other: SampledInputs) -> None:
        """Takes over what another gathered from other batches of the same shard."""
        for layer, parts in other._parts.items():
            self._parts.setdefault(layer, []).extend(parts)

    def tensors(self, start: int, stop: int) -> dict[str, Tensor]:
        """The content of a shard file, in the order of the corpus.

        Returns:
            `block` [n] int64, `position` and `domain` [n] int32; for every MoE layer l
            `l.hidden` [n, H] in the model's type, `l.ids` [n, k] int64, `l.gates` [n, k] and
            `l.logits` [n, E] float32.
        """
        sample, wanted = self._sample, self._sample.within(start, stop)
        found = {
            name: torch.from_numpy(np.ascontiguousarray(values[wanted]))
            for name, values in _places(sample).items()
        }
        for layer, parts in sorted(self._parts.items()):
            ordered = [tensors for _, tensors in sorted(parts, key=lambda part: part[0])]
            for kind in KINDS:
                found[f"{layer}.{kind}"] = torch.cat([tensors[kind] for tensors in ordered])
        return found


def _places(sample: Sample) -> dict[str, Any]:
    return {"block": sample.block, "position": sample.position, "domain": sample.domain}


def _rows(batch: Batch, block: Any, position: Any) -> Tensor:
    """Where (block, position) stand among the unpadded tokens of a batch: `[n]` int64."""
    lengths = np.array([len(row) for row in batch.rows])
    starts = np.cumsum(lengths) - lengths
    return torch.from_numpy(starts[block - batch.start] + position)


def _picked(routed: Routed, rows: Tensor) -> dict[str, Tensor]:
    rows = rows.to(routed.ids.device)
    return {
        "hidden": routed.inputs[rows].cpu(),
        "ids": routed.ids[rows].cpu().long(),
        "gates": routed.gates[rows].cpu().float(),
        "logits": routed.logits[rows].cpu().float(),
    }
