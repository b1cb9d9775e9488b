"""Perplexity and KL divergence as sums, so that batches and domains can be added."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """[N] fp32 negative log-likelihood in nats of every real token that follows a real token.

    Args:
        logits: [B, S, V].
        ids: [B, S].
        mask: [B, S] bool, False for padding.
    """
    keep = mask[:, 1:] & mask[:, :-1]
    predicted = logits[:, :-1][keep].float()
    return F.cross_entropy(predicted, ids[:, 1:][keep], reduction="none")


def kl_divergence(original: Tensor, other: Tensor) -> Tensor:
    """[N] KL(original || other) in nats of two [N, V] log-distributions."""
    return F.kl_div(other, original, reduction="none", log_target=True).sum(dim=-1)


def sampled_positions(count: int, wanted: int) -> Tensor:
    """`wanted` of `count` positions, evenly spaced; all of them when there are fewer."""
    if wanted >= count:
        return torch.arange(count)
    return torch.arange(wanted) * count // max(wanted, 1)


def overall(per_domain: Mapping[str, float]) -> float:
    """Geometric mean over domains: every domain counts the same, whatever its size."""
    return math.exp(sum(math.log(value) for value in per_domain.values()) / len(per_domain))
