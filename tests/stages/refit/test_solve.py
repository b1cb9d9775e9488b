"""The layer's problem against one dense least-squares system."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.refit.problem import Problem, outputs, sums_of
from stages.refit.solve import Fit, penalties, refit
from stages.refit.usage import usage
from tests.tiny import PROPERTY

SEEDS = st.integers(0, 2**16)
EXPERTS, NEURONS, HIDDEN, TOKENS = 3, 4, 5, 120
JOINT, BY_EXPERT = 10**6, 0


def layer(seed: int, tokens: int = TOKENS) -> tuple[Problem, Tensor]:
    """A layer of random ReLU experts with top-2 of 3, a random target, and random weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs, up = draw(tokens, HIDDEN), draw(EXPERTS, NEURONS, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(tokens)])
    gates = torch.rand(tokens, 2, generator=generator)
    problem = Problem(
        inputs=inputs,
        target=draw(tokens, HIDDEN),
        use=usage(ids, gates, EXPERTS),
        activations=lambda expert, x: (x @ up[expert].T).relu(),
        neurons=NEURONS,
    )
    return problem, draw(EXPERTS * NEURONS, HIDDEN)


def last_fifth(tokens: int = TOKENS) -> Tensor:
    return torch.arange(tokens) >= tokens * 4 // 5


def dense(problem: Problem) -> Tensor:
    """[N, K I] features, filled token by token: the oracle."""
    found = torch.zeros(len(problem.inputs), problem.unknowns, dtype=torch.float64)
    for expert, each in enumerate(problem.use):
        for token, gate in zip(each.tokens.tolist(), each.gates.tolist(), strict=True):
            hidden = problem.activations(expert, problem.inputs[token : token + 1])[0]
            found[token, problem.rows(expert)] = gate * hidden
    return found


def fit(problem: Problem, prior: Tensor, limit: int, strengths: tuple[float, ...] = (0.1,)) -> Fit:
    return refit(problem, prior, list(strengths), last_fifth(len(problem.inputs)), limit)


@PROPERTY
@given(seed=SEEDS)
def test_sums_and_outputs_are_those_of_the_dense_system(seed: int) -> None:
    problem, weights = layer(seed)
    chosen, features = ~last_fifth(), dense(problem)

    found = sums_of(problem, chosen)

    torch.testing.assert_close(found.gram, features[chosen].T @ features[chosen])
    torch.testing.assert_close(found.cross, features[chosen].T @ problem.target[chosen])
    torch.testing.assert_close(outputs(problem, weights), features @ weights)


@PROPERTY
@given(seed=SEEDS, strength=st.sampled_from([0.01, 0.1, 1.0]))
def test_the_joint_solution_is_that_of_the_stacked_system(seed: int, strength: float) -> None:
    problem, _ = layer(seed)
    features = dense(problem)
    prior = torch.zeros(problem.unknowns, HIDDEN, dtype=torch.float64)
    root = torch.diag(penalties(features.T @ features, EXPERTS, strength).sqrt())
    rows, goals = torch.cat([features, root]), torch.cat([problem.target, root @ prior])

    found = fit(problem, prior, JOINT, (strength,))

    if found.strength is not None:  # noise may not generalise, and then nothing is refitted
        expected = torch.linalg.lstsq(rows, goals).solution
        torch.testing.assert_close(found.weights, expected, rtol=1e-5, atol=1e-6)


def learnable(seed: int) -> tuple[Problem, Tensor, Tensor]:
    """A target that other down projections give exactly; returns those too."""
    problem, prior = layer(seed)
    truth = prior + torch.randn(prior.shape, generator=torch.Generator().manual_seed(seed))
    target = dense(problem) @ truth
    solvable = Problem(problem.inputs, target, problem.use, problem.activations, problem.neurons)
    return solvable, prior, truth


@pytest.mark.parametrize("limit", [JOINT, BY_EXPERT])
@pytest.mark.parametrize("seed", range(3))
def test_the_true_projections_are_found(limit: int, seed: int) -> None:
    problem, prior, _ = learnable(seed)

    found = fit(problem, prior, limit, (1e-6, 1e-2))

    assert found.strength == 1e-6
    assert found.error_after < 1e-3 < found.error_before
    assert found.held_out_after < 1e-3 < found.held_out_before


@pytest.mark.parametrize("seed", range(3))
def test_expert_by_expert_ends_at_the_joint_solution(seed: int) -> None:
    problem, prior, _ = learnable(seed)

    joint, descended = (fit(problem, prior, limit, (0.3,)) for limit in (JOINT, BY_EXPERT))

    torch.testing.assert_close(descended.weights, joint.weights, rtol=0.05, atol=0.05)
    assert descended.error_after == pytest.approx(joint.error_after, rel=0.05)


@pytest.mark.parametrize("limit", [JOINT, BY_EXPERT])
def test_what_does_not_generalise_is_not_refitted(limit: int) -> None:
    """A target that is noise around what the layer does, and three tokens per unknown."""
    problem, prior = layer(seed=4, tokens=40)
    noise = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
    exact = dense(problem) @ prior
    noisy = Problem(
        problem.inputs, exact + noise, problem.use, problem.activations, problem.neurons
    )

    found = fit(noisy, prior, limit, (1e-6,))

    assert found.strength is None
    assert found.weights.equal(prior)
    assert found.tokens_per_unknown == pytest.approx(40 / 12)


def test_an_expert_without_a_token_keeps_its_projection() -> None:
    problem, prior, _ = learnable(0)
    use = [*problem.use[:2], problem.use[2].among(torch.zeros(TOKENS, dtype=torch.bool))]
    missing = Problem(problem.inputs, problem.target, use, problem.activations, NEURONS)

    for limit in (JOINT, BY_EXPERT):
        found = fit(missing, prior, limit, (0.01,))
        assert found.weights[problem.rows(2)].equal(prior[problem.rows(2)])


@PROPERTY
@given(seed=SEEDS)
def test_gates_of_ids_that_meet_add_up(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (20, 3), generator=generator)
    gates = torch.rand(20, 3, generator=generator)
    groups = torch.tensor([0, 0, 1, -1, 1, 0])

    found = usage(groups[ids], gates, 2)

    for expert in range(2):
        expected = {
            token: sum(
                float(gates[token, j]) for j in range(3) if int(groups[ids[token, j]]) == expert
            )
            for token in range(20)
            if any(int(groups[i]) == expert for i in ids[token])
        }
        assert found[expert].tokens.tolist() == sorted(expected)
        assert found[expert].gates.tolist() == pytest.approx(
            [expected[t] for t in sorted(expected)]
        )
