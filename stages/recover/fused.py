"""Cross-entropy and distillation of a pass, and their gradient, in closed form.

With a small model the [tokens, vocabulary] values cost more than all layers together, if autograd
keeps a softmax for every term. Here logits are read once forward and once backward, a few rows at a
time, so that what lies between stays in the cache; nothing of their size is kept but they.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.recover.loss import Teacher

# Values of a part: 2 MB in fp32 for the cache of a CPU's core; elsewhere a few large kernels are
# faster.
_PART, _PART_ELSEWHERE = 1 << 19, 1 << 26


def summed_losses(
    logits: Tensor, labels: Tensor, real: Tensor, teacher: Teacher | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sums over predicted tokens: cross-entropy, and T^2 KL(teacher || student), in nats.

    The second is that of `stages.recover.loss.distillation`, added up; without a teacher it is 0.

    Args:
        logits: `[M, V]` float32, one row per position; the gradient flows into them alone.
        labels: `[M]` int64 the token behind each position.
        real: `[M]` bool: N positions behind which there is one. Others count nothing.
        teacher: of those N, in their order.
    """
    given = () if teacher is None else (teacher.ids, teacher.log_probabilities, teacher.rest)
    # torch does not type `Function.apply`.
    sums: tuple[Tensor, Tensor] = _Sums.apply(logits, labels, real, temperature, *given)  # type: ignore[no-untyped-call]
    return sums


@dataclass(frozen=True)
class _Rows:
    """What is known of some positions besides their logits; all `[n]`, or `[n, k]`."""

    labels: Tensor
    ids: Tensor | None
    wanted: Tensor | None  # log-probabilities of the teacher
    rest: Tensor | None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, real: Tensor, temperature: float, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        places, totals = real.nonzero()[:, 0], logits.new_zeros(2)
        norms = []
        for start, stop in _parts(len(places), logits):
            at = places[start:stop]
            rows = _Rows(labels[at], *_cut(given, start, stop))
            sums, norm = _forward(logits[at], rows, temperature)
            totals += sums
            norms.append(norm)
        ctx.temperature = temperature
        norm = torch.cat(norms, dim=1) if norms else logits.new_zeros(3, 0)
        ctx.save_for_backward(logits, labels, places, norm, *given)
        return totals[0], totals[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, places, norm, *given = ctx.saved_tensors
        found = torch.zeros_like(logits)
        for start, stop in _parts(len(places), logits):
            at = places[start:stop]
            rows = _Rows(labels[at], *_cut(given, start, stop))
            part = _backward(logits[at], rows, norm[:, start:stop], ctx.temperature, grads)
            found[at] = part
        return (found, None, None, None, *(None for _ in given))


def _forward(logits: Tensor, rows: _Rows, temperature: float) -> tuple[Tensor, Tensor]:
    """`[2]` sums, and `[3, n]` norms: of softmax(z), softmax(z / T), and of what is not named."""
    said = logits.gather(1, rows.labels[:, None])[:, 0]
    if rows.ids is None or rows.wanted is None or rows.rest is None:
        norm = logits.logsumexp(dim=1)
        return torch.stack([(norm - said).sum(), norm.new_zeros(())]), norm.expand(3, -1)
    plain = logits.logsumexp(dim=1) if temperature != 1 else None
    scaled = logits if plain is None else logits.div_(temperature)  # a copy already
    named = scaled.gather(1, rows.ids)
    others = scaled.scatter_(1, rows.ids, float("-inf")).logsumexp(dim=1)
    norm = torch.logaddexp(others, named.logsumexp(dim=1))
    plain = norm if plain is None else plain
    divergence = (rows.wanted.exp() * (rows.wanted - named + norm[:, None])).sum(dim=1)
    # Where nothing is left over, the term is 0: exp(-inf) times -inf would not be.
    left = rows.rest.exp() * (rows.rest - others + norm)
    divergence += left.where(rows.rest.isfinite(), 0.0)
    sums = [(plain - said).sum(), temperature**2 * divergence.sum()]
    return torch.stack(sums), torch.stack([plain, norm, others])


def _backward(
    logits: Tensor, rows: _Rows, norms: Tensor, temperature: float, grads: tuple[Tensor, ...]
) -> Tensor:
    """[n, V] of the weighted sums: with p and q the softmax of z and of z / T, t and r the
    teacher's named and left-over mass, and R what q leaves over,

    p - [label] for the first; for the second T (q - t) at named tokens and T q (1 - r / R) at
    others.
    """
    plain, norm, others = norms[:, :, None]
    first, second = grads[0], grads[1] * temperature
    if rows.ids is None or rows.wanted is None or rows.rest is None:
        found = logits.sub_(plain).exp_().mul_(first)
        return found.scatter_add_(1, rows.labels[:, None], -first.expand_as(plain))
    named = logits.gather(1, rows.ids)
    sharp = named if temperature == 1 else named / temperature
    exact = first * (named - plain).exp() + second * ((sharp - norm).exp() - rows.wanted.exp())
    # As shares of what is not named, which stay numbers where q leaves next to nothing over. At
    # named tokens they may be infinite; these are written over.
    ours, theirs = (others - norm).exp(), rows.rest[:, None].exp()
    if temperature == 1:
        weight = first * ours + second * (ours - theirs)
        found = logits.sub_(others).exp_().mul_(weight)
    else:
        found = (logits / temperature).sub_(others).exp_().mul_(second * (ours - theirs))
        found += logits.sub_(plain).exp_().mul_(first)
    found.scatter_(1, rows.ids, exact)
    return found.scatter_add_(1, rows.labels[:, None], -first.expand_as(plain))


def _parts(count: int, logits: Tensor) -> list[tuple[int, int]]:
    """Ranges of real positions."""
    values = _PART if logits.device.type == "cpu" else _PART_ELSEWHERE
    step = max(values // logits.shape[1], 1)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _cut(given: Any, start: int, stop: int) -> list[Tensor | None]:
    return [each[start:stop] for each in given] or [None, None, None]
