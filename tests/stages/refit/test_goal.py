"""What gradient steps lead to: outputs, or distributions behind the model's last layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.expert_function import activation
from stages.refit.config import PolishConfig
from stages.refit.goal import Distributions, Goal, Outputs, average
from stages.refit.polish import layer_output, polish
from tests.tiny import random_expert, random_input

TOKENS, HIDDEN, VOCABULARY = 40, 6, 11
FACTOR = 0.5
SILU = activation({"hidden_act": "silu"})


def head(stream: Tensor) -> Tensor:
    """A norm and a linear map, as models have it."""
    normed = stream / stream.square().mean(dim=-1, keepdim=True).sqrt()
    return normed @ random_input(VOCABULARY, HIDDEN, seed=9).T


def final() -> Distributions:
    target, stream = (random_input(TOKENS, HIDDEN, seed=seed) for seed in (1, 2))
    return Distributions(target, stream, FACTOR, head)


def everything() -> Tensor:
    return torch.arange(TOKENS)


def test_the_divergence_is_that_of_the_stream_with_these_outputs() -> None:
    """Token by token from the definition: rest + factor * experts, where rest is what is left."""
    goal, made = final(), random_input(TOKENS, HIDDEN, seed=3)
    total = 0.0
    for token in range(TOKENS):
        rest = goal.stream[token] - FACTOR * goal.target[token]
        wanted, found = (
            head(each[None])[0].double().softmax(-1).tolist()
            for each in (goal.stream[token], rest + FACTOR * made[token])
        )
        total += sum(p * math.log(p / q) for p, q in zip(wanted, found, strict=True))

    assert float(goal.loss(made, everything())) == pytest.approx(total / TOKENS, rel=1e-4)


def test_nothing_is_off_at_the_target() -> None:
    goal = final()
    assert float(goal.loss(goal.target, everything())) == pytest.approx(0, abs=1e-6)
    outputs = Outputs(goal.target)
    assert float(outputs.loss(goal.target, everything())) == 0
    assert float(outputs.loss(torch.zeros_like(goal.target), everything())) == pytest.approx(1)


@pytest.mark.parametrize("goal", [final(), Outputs(final().target)], ids=["final", "outputs"])
def test_a_part_of_a_goal_and_its_average_in_chunks(
    goal: Goal, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, chosen = random_input(TOKENS, HIDDEN, seed=3), everything() % 3 == 0
    part = goal.among(chosen)
    whole = float(part.loss(made[chosen], torch.arange(int(chosen.sum()))))
    monkeypatch.setattr("stages.refit.goal._CHUNK", 5)

    assert average(part, made[chosen]) == pytest.approx(whole, rel=1e-5)


def test_a_token_of_weight_two_counts_as_two_tokens() -> None:
    goal, made = final(), random_input(TOKENS, HIDDEN, seed=3)
    weights = torch.ones(TOKENS)
    weights[:10] = 2
    twice = torch.cat([everything(), torch.arange(10)])

    weighed = goal.weighed(weights).loss(made * weights.sqrt()[:, None], everything())

    assert float(weighed) == pytest.approx(float(goal.loss(made[twice], twice)), rel=1e-4)


def test_steps_towards_distributions_lower_the_divergence() -> None:
    """Further than steps towards outputs do, where too few neurons are left for these."""
    experts = [random_expert(2, HIDDEN, seed, gated=True) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    gates, ids = torch.randn(TOKENS, 3, generator=generator).softmax(dim=-1).topk(2)
    x, goal, config = random_input(TOKENS, HIDDEN, seed=4), final(), PolishConfig(steps=200)

    def off(goal: Goal | None) -> float:
        made = experts if goal is None else polish(experts, x, (ids, gates), goal, SILU, config)
        return float(final().loss(layer_output(made, x, ids, gates, SILU), everything()))

    assert off(goal) < off(Outputs(goal.target)) < off(None)
