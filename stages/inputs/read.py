"""Reads what entered the MoE block of a layer: `calibration/inputs/layer-00003.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.tensors import read_metadata
from stages.errors import StatisticsError


@dataclass(frozen=True)
class LayerInputs:
    """N sampled tokens in one layer, in the order of the corpus: the same tokens in every layer."""

    layer: int
    hidden: Tensor  # [N, H] in the model's type: what router and experts saw
    ids: Tensor  # [N, k] int64 selected experts
    gates: Tensor  # [N, k] float32, the weights that the model multiplied with
    logits: Tensor  # [N, E] float32 raw router logits
    block: Tensor  # [N] int64 index in the corpus
    position: Tensor  # [N] int32 index in the block
    domain: Tensor  # [N] int32 index into `domains`
    domains: tuple[str, ...]
    seed: int
    inputs: dict[str, str]  # fingerprints of model, tokenizer, data and corpus

    @classmethod
    def read(cls, path: Path) -> LayerInputs:
        """Opens one layer's file.

        Raises:
            StatisticsError: missing, damaged or another kind of file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            fields: dict[str, Any] = {**load_file(path), **_typed(read_metadata(path))}
            return cls(**fields)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StatisticsError(f"cannot read layer inputs from {path}: {error}") from error

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[1]

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def dense_gates(self) -> Tensor:
        """[N, E] float64: the gate of every expert, zero where it was not selected."""
        zeros = torch.zeros(len(self), self.num_experts, dtype=torch.float64)
        return zeros.scatter_(1, self.ids, self.gates.double())

    def weights(self, task: Mapping[str, float]) -> Tensor:
        """[N] float32: how much each token counts, by its domain."""
        of_domain = torch.tensor([task.get(name, 0.0) for name in self.domains])
        return of_domain[self.domain.long()]

    def only(self, kept: Tensor) -> LayerInputs:
        """Some of the tokens, [N] bool."""
        rows = ("hidden", "ids", "gates", "logits", "block", "position", "domain")
        return replace(self, **{name: getattr(self, name)[kept] for name in rows})

    def rows_of(self, domain: str) -> Tensor:
        """Indices of the tokens of one domain, ascending."""
        return torch.nonzero(self.domain == self.domains.index(domain)).reshape(-1)


def _typed(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": int(metadata["layer"]),
        "domains": tuple(metadata["domains"]),
        "seed": int(metadata["seed"]),
        "inputs": dict(metadata["inputs"]),
    }
