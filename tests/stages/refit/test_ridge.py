"""Ridge least squares against what torch's own least squares gives on the stacked system."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.refit.ridge import gram, ridge_of, solve, squared_error
from tests.tiny import PROPERTY

SEEDS = st.integers(0, 2**16)


def problem(seed: int, tokens: int, width: int, hidden: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, width), (tokens, hidden), (width, hidden))
    features, target, prior = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return features, target, prior


def stacked(features: Tensor, target: Tensor, ridge: Tensor, prior: Tensor) -> Tensor:
    """The oracle: penalties as additional rows of an ordinary least-squares problem."""
    root = torch.diag(ridge.sqrt())
    rows, goals = torch.cat([features, root]), torch.cat([target, root @ prior])
    return torch.linalg.lstsq(rows, goals, driver="gelsd").solution


@PROPERTY
@given(seed=SEEDS, tokens=st.integers(1, 30), width=st.integers(1, 8), strength=st.floats(0.01, 2))
def test_the_solution_is_that_of_the_stacked_system(
    seed: int, tokens: int, width: int, strength: float
) -> None:
    features, target, prior = problem(seed, tokens, width)
    products = gram(features)
    ridge = ridge_of(products, strength)

    found = solve(products, features.T @ target, ridge, prior).weights

    torch.testing.assert_close(found, stacked(features, target, ridge, prior), rtol=1e-6, atol=1e-6)


@PROPERTY
@given(seed=SEEDS, strength=st.floats(0, 10))
def test_a_prior_that_fits_stays(seed: int, strength: float) -> None:
    features, _, prior = problem(seed, 20, 5)
    products = gram(features)

    found = solve(products, features.T @ (features @ prior), ridge_of(products, strength), prior)

    torch.testing.assert_close(found.weights, prior, rtol=0, atol=1e-9)


@PROPERTY
@given(seed=SEEDS)
def test_a_stronger_ridge_stays_closer_to_the_prior(seed: int) -> None:
    features, target, prior = problem(seed, 12, 6)
    products, cross = gram(features), features.T @ target

    moved = [
        float((solve(products, cross, ridge_of(products, s), prior).weights - prior).norm())
        for s in (0.0, 0.1, 1.0, 10.0)
    ]

    assert moved == sorted(moved, reverse=True)


@PROPERTY
@given(seed=SEEDS)
def test_the_refit_never_fits_worse_than_the_prior(seed: int) -> None:
    features, target, prior = problem(seed, 15, 6)
    products, cross = gram(features), features.T @ target

    found = solve(products, cross, ridge_of(products, 0.1), prior).weights

    size = float(target.square().sum())
    assert squared_error(products, cross, size, found) <= squared_error(
        products, cross, size, prior
    )


@PROPERTY
@given(seed=SEEDS)
def test_the_error_is_that_of_the_residual(seed: int) -> None:
    features, target, prior = problem(seed, 9, 4)

    found = squared_error(gram(features), features.T @ target, float(target.square().sum()), prior)

    expected = float((target - features @ prior).square().sum())
    assert abs(found - expected) <= 1e-9 * max(expected, 1)


def test_without_a_token_the_prior_stays() -> None:
    _, _, prior = problem(0, 1, 4)
    zeros = torch.zeros(4, 4, dtype=torch.float64)

    found = solve(zeros, torch.zeros(4, 3, dtype=torch.float64), zeros[0], prior)

    assert found.weights.equal(prior)


def test_more_unknowns_than_tokens_is_solved_and_said() -> None:
    features, target, prior = problem(1, 3, 8)
    products = gram(features)

    found = solve(products, features.T @ target, ridge_of(products, 0.0), prior)

    assert found.weights.isfinite().all()
    assert found.condition > 1e6
