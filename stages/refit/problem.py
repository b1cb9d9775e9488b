"""The least-squares problem of one layer: features of the kept experts, and a target.

Features are made anew from the activations function whenever they are needed: [n, I] of one expert
is all that is held beside the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.refit.usage import Usage

# h_e(x): hidden units of expert e for inputs [n, H], as [n, I].
Activations = Callable[[int, Tensor], Tensor]
# Tokens whose features of all experts lie in memory at once.
_CHUNK = 2048


@dataclass(frozen=True)
class Problem:
    """T [N, H] from inputs x [N, H] through K experts of I neurons each."""

    inputs: Tensor
    target: Tensor
    use: Sequence[Usage]
    activations: Activations
    neurons: int

    @property
    def unknowns(self) -> int:
        """Rows to solve for, K I."""
        return len(self.use) * self.neurons

    def among(self, chosen: Tensor) -> Problem:
        """The same problem on some of the tokens, [N] bool."""
        use = [each.among(chosen) for each in self.use]
        return Problem(self.inputs, self.target, use, self.activations, self.neurons)

    def rows(self, expert: int) -> slice:
        """Where an expert's neurons lie among the unknowns."""
        return slice(expert * self.neurons, (expert + 1) * self.neurons)

    def features(self, expert: int) -> Tensor:
        """g_e h_e over the tokens of one expert, [n, I] fp64."""
        each = self.use[expert]
        hidden = self.activations(expert, self.inputs[each.tokens])
        return hidden.double() * each.gates[:, None]


@dataclass(frozen=True)
class Sums:
    """All that a joint solution needs; additive over tokens."""

    gram: Tensor  # [K I, K I] fp64
    cross: Tensor  # [K I, H] fp64
    target_sq: float

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram, self.cross + other.cross, self.target_sq + other.target_sq
        )


def sums_of(problem: Problem, chosen: Tensor) -> Sums:
    """Gram and cross products over the chosen tokens, [N] bool, in chunks of tokens."""
    size, width = problem.unknowns, problem.target.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, width, dtype=torch.float64)
    for tokens in torch.split(chosen.nonzero()[:, 0], _CHUNK):
        part = _dense(problem, tokens)
        gram += part.T @ part
        cross += part.T @ problem.target[tokens].double()
    return Sums(gram, cross, float(problem.target[chosen].double().square().sum()))


def outputs(problem: Problem, weights: Tensor) -> Tensor:
    """What the layer does with down projections `weights` [K I, H]: [N, H] fp64."""
    total = torch.zeros(problem.target.shape, dtype=torch.float64)
    for expert, each in enumerate(problem.use):
        total.index_add_(0, each.tokens, problem.features(expert) @ weights[problem.rows(expert)])
    return total


def _dense(problem: Problem, tokens: Tensor) -> Tensor:
    """Features of all experts side by side for some tokens: [len(tokens), K I]."""
    position = torch.full((len(problem.target),), -1)
    position[tokens] = torch.arange(len(tokens))
    found = torch.zeros(len(tokens), problem.unknowns, dtype=torch.float64)
    part = problem.among(position >= 0)
    for expert, each in enumerate(part.use):
        found[position[each.tokens], part.rows(expert)] = part.features(expert)
    return found
