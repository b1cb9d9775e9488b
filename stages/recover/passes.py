"""One pass of a step: a few blocks through the student, and what they add to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.corpus.blocks import Block
from stages.forward import run
from stages.recover.config import RecoverConfig
from stages.recover.fused import summed_losses
from stages.recover.loss import Teacher
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
    logits, labels, real = _predictions(model, blocks)
    likelihood, distilled = summed_losses(
        logits, labels, real, None if teacher is None else _on(teacher, logits), config.temperature
    )
    if teacher is None:
        return likelihood / tokens, _sums(likelihood, distilled)
    # The paper's code adds up positions, divides by sequences and leaves T^2 out.
    share = 1 / tokens
    if config.scaling == "paper":
        share = 1 / (config.batch * config.temperature**2)
    loss = likelihood / tokens + config.alpha * share * distilled
    return loss, _sums(likelihood, distilled)


def _predictions(model: Any, blocks: Sequence[Block]) -> tuple[Tensor, Tensor, Tensor]:
    """[M, V] fp32 logits at every position, the tokens [M] behind, and where one is real [M]."""
    logits, ids, mask = run(model, [block.tokens for block in blocks])
    real = torch.zeros_like(mask)
    real[:, :-1] = mask[:, 1:] & mask[:, :-1]
    return logits.flatten(0, 1).float(), ids.roll(-1, dims=1).flatten(), real.flatten()


def _on(teacher: Teacher, values: Tensor) -> Teacher:
    """On the device of the logits."""
    parts = (teacher.ids, teacher.log_probabilities, teacher.rest)
    return Teacher(*(each.to(values.device) for each in parts))


def _sums(likelihood: Tensor, distilled: Tensor) -> Tensor:
    return torch.stack([likelihood.detach().double(), distilled.detach().double()])


def teacher_of_blocks(taught: Taught | None, indices: Sequence[int]) -> Teacher | None:
    """What was said along these blocks."""
    return None if taught is None else taught.blocks(indices)
