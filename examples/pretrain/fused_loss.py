"""Cross-entropy of a tied output head without ever holding all logits.

With a small model the [tokens, vocabulary] matrix costs more memory traffic than everything else
together. Logits are made chunk by chunk, and the gradient of each chunk is taken while it is still
in cache, as a mean cross-entropy needs nothing from the other chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 512


class FusedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden [N, H] (bf16) against table [V, H] (fp32), targets [N]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Loss, with both gradients computed on the way."""
        weight = table.to(hidden.dtype)
        hidden_grad, table_grad = torch.empty_like(hidden), torch.zeros_like(table)
        total = torch.zeros(())
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            loss, logits_grad = chunk_loss(hidden[rows] @ weight.T, targets[rows])
            total += loss
            torch.mm(logits_grad, weight, out=hidden_grad[rows])
            table_grad += logits_grad.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, table_grad)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Scale the stored gradients of the sum to those of the mean."""
        hidden_grad, table_grad = ctx.saved_tensors
        scale = grads[0] / len(hidden_grad)
        return hidden_grad * scale, table_grad * scale, None


def chunk_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of logits [n, V], and its gradient in the dtype of the logits."""
    scores = logits.float()
    target_scores = scores.gather(1, targets[:, None])
    log_norm = scores.logsumexp(1, keepdim=True)  # [n, 1]
    probabilities = scores.sub_(log_norm).exp_()
    probabilities.scatter_add_(1, targets[:, None], -torch.ones_like(target_scores))
    return (log_norm - target_scores).sum(), probabilities.to(logits.dtype)


def fused_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all positions."""
    # torch does not type `Function.apply`.
    loss: Tensor = FusedCrossEntropy.apply(hidden, table, targets)  # type: ignore[no-untyped-call]
    return loss
