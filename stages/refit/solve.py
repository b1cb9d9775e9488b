"""Solves one layer's problem: jointly where the Gram matrix fits, else expert by expert.

Expert by expert is block coordinate descent (Gauss-Seidel) on the same objective: each expert is
solved exactly against what the others leave over, in a fixed order, until nothing moves any more.
It needs one I x I Gram matrix at a time and ends at the joint solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.refit.problem import Problem, Sums, outputs, sums_of
from stages.refit.ridge import gram, ridge_of, solve, squared_error

_SWEEPS = 50
# A sweep that lowers the error by less than this share is the last one.
_SETTLED = 1e-4


@dataclass(frozen=True)
class Fit:
    """New down projections and what they are worth; errors are shares of |T|^2."""

    weights: Tensor  # [K I, H] fp64
    strength: float | None  # None: the refit did not generalise and was not made
    error_before: float  # on all tokens
    error_after: float
    held_out_before: float
    held_out_after: float
    condition: float
    tokens_per_unknown: float


def refit(
    problem: Problem, prior: Tensor, strengths: list[float], held_out: Tensor, joint_limit: int
) -> Fit:
    """Chooses the strength of the ridge on held-out tokens, then solves on all of them.

    Args:
        prior: [K I, H] fp64, the down projections before.
        strengths: ridge in units of each expert's mean feature energy, to choose from.
        held_out: [N] bool.
        joint_limit: largest K I that is solved jointly.
    """
    if problem.unknowns <= joint_limit:
        return _joint(problem, prior, strengths, held_out)
    return _by_expert(problem, prior, strengths, held_out)


def penalties(gram_matrix: Tensor, experts: int, strength: float) -> Tensor:
    """[K I] the ridge: in units of each expert's own mean diagonal, so that a rarely used expert is
    not drowned by the others."""
    diagonals = gram_matrix.diagonal().view(experts, -1)
    return torch.cat([ridge_of(torch.diag(each), strength) for each in diagonals])


def _joint(problem: Problem, prior: Tensor, strengths: list[float], held_out: Tensor) -> Fit:
    inside, outside = sums_of(problem, ~held_out), sums_of(problem, held_out)
    whole, experts = inside + outside, len(problem.use)

    def error(sums: Sums, weights: Tensor) -> float:
        return squared_error(sums.gram, sums.cross, sums.target_sq, weights) / max(
            sums.target_sq, 1e-300
        )

    def solved(sums: Sums, strength: float) -> tuple[Tensor, float]:
        found = solve(sums.gram, sums.cross, penalties(sums.gram, experts, strength), prior)
        return found.weights, found.condition

    tried = {each: error(outside, solved(inside, each)[0]) for each in strengths}
    before = error(outside, prior)
    strength = _best(tried, before)
    weights, condition = (prior, 1.0) if strength is None else solved(whole, strength)
    return Fit(
        weights=weights,
        strength=strength,
        error_before=error(whole, prior),
        error_after=error(whole, weights),
        held_out_before=before,
        held_out_after=before if strength is None else tried[strength],
        condition=condition,
        tokens_per_unknown=len(held_out) / problem.unknowns,
    )


def _by_expert(problem: Problem, prior: Tensor, strengths: list[float], held_out: Tensor) -> Fit:
    inside = problem.among(~held_out)
    tried = {
        each: _share(problem, _descend(inside, prior, each, ~held_out)[0], held_out)
        for each in strengths
    }
    before, everything = _share(problem, prior, held_out), torch.ones_like(held_out)
    strength = _best(tried, before)
    weights, condition = (
        (prior, 1.0) if strength is None else _descend(problem, prior, strength, everything)
    )
    return Fit(
        weights=weights,
        strength=strength,
        error_before=_share(problem, prior, everything),
        error_after=_share(problem, weights, everything),
        held_out_before=before,
        held_out_after=before if strength is None else tried[strength],
        condition=condition,
        tokens_per_unknown=len(held_out) / problem.unknowns,
    )


def _descend(
    problem: Problem, prior: Tensor, strength: float, chosen: Tensor
) -> tuple[Tensor, float]:
    """Weights [K I, H] and the worst conditioning of an expert's system."""
    weights, worst = prior.clone(), 1.0
    left = problem.target.double() - outputs(problem, prior)  # what is still missing: [N, H]
    size = float(left[chosen].square().sum())
    for _ in range(_SWEEPS):
        for expert, each in enumerate(problem.use):
            if not len(each.tokens):
                continue
            rows, features = problem.rows(expert), problem.features(expert)
            products = gram(features)
            # The expert's own target: what is missing and what it contributes now.
            cross = features.T @ left[each.tokens] + products @ weights[rows]
            found = solve(products, cross, ridge_of(products, strength), prior[rows])
            left.index_add_(0, each.tokens, features @ (weights[rows] - found.weights))
            weights[rows], worst = found.weights, max(worst, found.condition)
        now = float(left[chosen].square().sum())
        if size - now <= _SETTLED * size:
            break
        size = now
    return weights, worst


def _share(problem: Problem, weights: Tensor, chosen: Tensor) -> float:
    """|T - Phi W|^2 / |T|^2 over some tokens."""
    target = problem.target[chosen].double()
    missing = (target - outputs(problem, weights)[chosen]).square().sum()
    return float(missing / target.square().sum().clamp(min=1e-300))


def _best(tried: dict[float, float], before: float) -> float | None:
    """The strength with the smallest held-out error; None if leaving all as it is was better."""
    strength = min(tried, key=lambda each: (tried[each], -each))
    return strength if tried[strength] < before else None
