"""L = L_CE + alpha * L_KD per token that is predicted (arXiv 2310.01334, section 3.3, table A11).

The paper gives alpha 0.2 and temperature 2 and does not say how L_KD is scaled. Its code leaves the
factor T^2 out and adds up positions, padding included, so that the weight of the distillation grows
with the length of a sequence. Here both terms are means over valid tokens and the KL carries T^2,
whose gradient then does not fade with T (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Teacher:
    """What the original says at N positions, at the temperature at which it is compared.

    With all V tokens named the comparison is exact and `rest` is -inf; with the k likeliest ones
    everything else counts as one more token.
    """

    ids: Tensor  # [N, k] int64
    log_probabilities: Tensor  # [N, k] float32, of softmax(logits / T)
    rest: Tensor  # [N] float32: log of the mass of all other tokens; -inf where there is none


def teacher_of(logits: Tensor, temperature: float, top: int | None = None) -> Teacher:
    """Names the `top` likeliest tokens of `[N, V]` logits; None: all of them."""
    scaled = logits.float() / temperature
    every = scaled.log_softmax(dim=-1)
    size = every.shape[-1] if top is None else min(top, every.shape[-1])
    named, ids = every.topk(size, dim=-1)
    return Teacher(ids, named, _rest(every, ids))


def distillation(logits: Tensor, teacher: Teacher, temperature: float) -> Tensor:
    """[N] T^2 * KL(teacher || student) in nats, over the named tokens and the rest as one token.

    Merging tokens into one never raises a KL divergence (data processing inequality), so that fewer
    named tokens give a lower bound of the exact one.

    Args:
        logits: `[N, V]` of the student; the gradient flows into them alone.
    """
    student = (logits.float() / temperature).log_softmax(dim=-1)
    named = student.gather(-1, teacher.ids)
    wanted = teacher.log_probabilities
    divergence = (wanted.exp() * (wanted - named)).sum(dim=-1)
    has_rest = torch.isfinite(teacher.rest)
    # Where nothing is left over, the term is 0, and so must be its gradient: no -inf on the way.
    ours = torch.where(has_rest, _rest(student, teacher.ids), torch.zeros_like(teacher.rest))
    theirs = torch.where(has_rest, teacher.rest, torch.zeros_like(teacher.rest))
    left_over = torch.where(has_rest, theirs.exp() * (theirs - ours), torch.zeros_like(ours))
    return temperature**2 * (divergence + left_over)


def recovery_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Teacher | None,
    *,
    alpha: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy plus alpha times mean distillation, and the two means `[2]` for a log.

    Args:
        logits: `[N, V]` of the student at the N positions whose next token is real.
        labels: `[N]` those next tokens.
        teacher: of the same positions; None: cross-entropy alone.
    """
    likelihood = F.cross_entropy(logits.float(), labels)
    if teacher is None:
        return likelihood, torch.stack([likelihood, likelihood.new_zeros(())]).detach()
    distilled = distillation(logits, teacher, temperature).mean()
    return likelihood + alpha * distilled, torch.stack([likelihood, distilled]).detach()


def paper_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """The scaling of the paper's code, to compare with: positions are added up, T^2 is left out.

    Args:
        student, teacher: `[B, S, V]` logits, every position counted.
        labels: `[B, S]`, -100 where nothing is predicted.
    """
    likelihood = F.cross_entropy(student.float().flatten(0, 1), labels.flatten())
    ours = (student.float() / temperature).log_softmax(dim=-1)
    theirs = (teacher.float() / temperature).log_softmax(dim=-1)
    added_up = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return likelihood + alpha * added_up / student.shape[0]


def _rest(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """[N] log of the mass of the tokens that `ids` does not name."""
    others = log_probabilities.scatter(-1, ids, float("-inf"))
    if ids.shape[-1] == log_probabilities.shape[-1]:
        return others.amax(dim=-1)
    return others.logsumexp(dim=-1)
