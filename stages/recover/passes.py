"""One pass of a step: a few blocks through the student, and what they add to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.corpus.blocks import Block
from stages.forward import run
from stages.recover.config import RecoverConfig
from stages.recover.loss import Teacher, distillation
from stages.recover.taught import Taught


def part_of_loss(
    model: Any,
    blocks: Sequence[Block],
    teacher: Teacher | None,
    config: RecoverConfig,
    tokens: int,
) -> tuple[Tensor, Tensor]:
    """What some blocks of a step add to its loss.

    Args:
        blocks: of this pass.
        teacher: at all their predicted positions, one block behind the other.
        tokens: predicted in the whole step, on all ranks.

    Returns:
        this part of the loss, with its gradient; and its sums `[2]` float64 of cross-entropy and
        distillation over tokens.
    """
    said, labels = _predictions(model, blocks)
    likelihood = torch.nn.functional.cross_entropy(said, labels, reduction="sum")
    if teacher is None:
        return likelihood / tokens, _sums(likelihood, torch.zeros_like(likelihood))
    here = Teacher(
        teacher.ids.to(said.device),
        teacher.log_probabilities.to(said.device),
        teacher.rest.to(said.device),
    )
    distilled = distillation(said, here, config.temperature).sum()
    # The paper's code adds up positions, divides by sequences and leaves T^2 out.
    share = 1 / tokens
    if config.scaling == "paper":
        share = 1 / (config.batch * config.temperature**2)
    loss = likelihood / tokens + config.alpha * share * distilled
    return loss, _sums(likelihood, distilled)


def _predictions(model: Any, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """[N, V] fp32 logits before every real token, and the tokens [N]."""
    logits, ids, mask = run(model, [block.tokens for block in blocks])
    keep = mask[:, 1:] & mask[:, :-1]
    return logits[:, :-1][keep].float(), ids[:, 1:][keep]


def _sums(likelihood: Tensor, distilled: Tensor) -> Tensor:
    return torch.stack([likelihood.detach().double(), distilled.detach().double()])


def teacher_of_blocks(taught: Taught | None, indices: Sequence[int]) -> Teacher | None:
    """What was said along these blocks."""
    return None if taught is None else taught.blocks(indices)
