"""What gradient steps on a layer's experts lead to: its outputs, or the model's distributions.

A goal says how far the outputs of some tokens are off. Both are free of labels: one compares with
what the original layer adds up to, the other with what the original model says behind its last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

# Tokens of which distributions over the whole vocabulary are in memory at once.
_CHUNK = 1024


class Goal(Protocol):
    """[n, H] fp32 outputs of the tokens `some` [n] int64 of the sample -> how far they are off."""

    def loss(self, made: Tensor, some: Tensor) -> Tensor:
        """A scalar, its mean over these tokens."""

    def among(self, chosen: Tensor) -> Goal:
        """The same for some of the tokens, [N] bool; what is made in inference mode is copied."""


@dataclass(frozen=True)
class Outputs:
    """Mean squared error, in units of what the layer puts out."""

    target: Tensor  # [N, H]

    def loss(self, made: Tensor, some: Tensor) -> Tensor:
        """See `Goal`."""
        found: Tensor = (made - self.target[some]).square().mean() / self._scale
        return found

    @cached_property
    def _scale(self) -> Tensor:
        return self.target.square().mean().clamp(min=1e-30)

    def among(self, chosen: Tensor) -> Outputs:
        """See `Goal`."""
        return Outputs(self.target[chosen].clone())


@dataclass(frozen=True)
class Distributions:
    """KL(original || reduced) of the next token's distribution, behind the model's last layer.

    The residual stream behind that layer is rest + factor * experts, and its target was made of the
    original stream by the same equation, so that what the experts put out beside their target moves
    the original stream by `factor` times as much.
    """

    target: Tensor  # [N, H] what the experts' sum has to be for the stream to be the original one
    stream: Tensor  # [N, H] the original residual stream
    factor: float
    head: Callable[[Tensor], Tensor]  # [n, H] residual stream -> [n, V] logits
    weights: Tensor | None = None  # [N] what a token counts; None: all alike

    def loss(self, made: Tensor, some: Tensor) -> Tensor:
        """See `Goal`; in nats."""
        off = made - self.target[some]
        weights = None if self.weights is None else self.weights[some]
        if weights is not None:
            off = off / weights.sqrt()[:, None]
        stream = self.stream[some]
        with torch.no_grad():
            wanted = self.head(stream).log_softmax(dim=-1)
        found = self.head(stream + self.factor * off).log_softmax(dim=-1)
        each = (wanted.exp() * (wanted - found)).sum(dim=-1)
        return (each if weights is None else each * weights / self._weight).mean()

    @cached_property
    def _weight(self) -> Tensor:
        assert self.weights is not None
        return self.weights.mean()

    def weighed(self, weights: Tensor) -> Distributions:
        """With weights [N] of tokens, of which outputs and target are scaled by the roots."""
        return replace(self, target=self.target * weights.sqrt()[:, None], weights=weights)

    def among(self, chosen: Tensor) -> Distributions:
        """See `Goal`."""
        weights = None if self.weights is None else self.weights[chosen].clone()
        target, stream = (each[chosen].clone() for each in (self.target, self.stream))
        return replace(self, target=target, stream=stream, weights=weights)


def average(goal: Goal, made: Tensor) -> float:
    """The mean loss over all tokens of a goal, [N, H] outputs, in chunks."""
    total = 0.0
    for some in torch.split(torch.arange(len(made)), _CHUNK):
        total += float(goal.loss(made[some], some)) * len(some)
    return total / max(len(made), 1)
