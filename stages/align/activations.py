"""Alignment by what neurons do on the same tokens, alone or together with their weights.

Neurons of two experts that rise and fall together on a layer's sampled inputs do the same work,
also where their weights were scaled or drifted apart (REAM, arXiv 2604.04356, sums both costs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.expert import Expert


def activation_gain(reference: Tensor, target: Tensor) -> Tensor:
    """[I, I] float32: cosine of reference neuron i and target neuron j over the tokens.

    Maximising its trace minimises the summed squared distance of activations of norm 1. Neurons
    that are never active are like nothing.

    Args:
        reference: [N, I] gated activations of one expert, before its down projection.
        target: [N, I] those of the other expert on the same tokens.
    """
    return (_unit(reference.float().T) @ _unit(target.float().T).T).float()


def weight_cosine(reference: Expert, target: Expert) -> Tensor:
    """[I, I] float32: cosine of all weights of neuron i and of neuron j: gate, up, biases, down."""
    return _unit(_neurons(reference)) @ _unit(_neurons(target)).T


def joint_gain(
    reference: Expert, target: Expert, reference_acts: Tensor, target_acts: Tensor
) -> Tensor:
    """[I, I] float32: activation and weight cosines in equal parts."""
    return activation_gain(reference_acts, target_acts) + weight_cosine(reference, target)


def _neurons(expert: Expert) -> Tensor:
    """[I, P] float32: everything that belongs to a neuron."""
    rows = [row.float().reshape(expert.neurons, -1) for row in expert.neuron_rows()]
    return torch.cat([*rows, expert.down.float().T], dim=1)


def _unit(rows: Tensor) -> Tensor:
    """Rows of norm 1; rows of zeros stay."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)
