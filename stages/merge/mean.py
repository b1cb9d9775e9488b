"""Merging the experts of one group (MC-SMoE equation 2: the frequency-weighted mean)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.expert import Expert


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum; a group that was never used falls back to the plain mean.

    Raises:
        ValueError: a weight is negative or not finite.
    """
    if not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"merge weights must be finite and not negative: {list(weights)}")
    total = sum(weights)
    return [w / total if total > 0 else 1 / len(weights) for w in weights]


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i a_i T_i / sum_i a_i, accumulated in fp64 and rounded once to the storage type.

    No epsilon: it would shrink rarely used experts (with 512 experts and 1e-3, by a third).
    """
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, normalised(weights), strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total.to(tensors[0].dtype)


def merge(experts: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """One expert for a group whose members are already aligned.

    A group of one is returned as it is, bit for bit (invariant 6).
    """
    if len(experts) == 1:
        return experts[0]
    members = [expert.tensors() for expert in experts]
    return Expert(
        **{name: weighted_mean([each[name] for each in members], weights) for name in members[0]}
    )
