"""Gradient steps towards a layer's outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.expert import Expert
from models.expert_function import activation
from stages.refit.config import PolishConfig
from stages.refit.goal import Outputs
from stages.refit.polish import layer_output, polish, stacked_output
from tests.tiny import apply, random_expert

HIDDEN, NEURONS, EXPERTS, TOKENS = 6, 5, 3, 200
SILU = activation({"hidden_act": "silu"})


def layer() -> tuple[list[Expert], Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    experts = [random_expert(NEURONS, HIDDEN, seed, gated=True) for seed in range(EXPERTS)]
    gates, ids = torch.randn(TOKENS, EXPERTS, generator=generator).softmax(dim=-1).topk(2)
    return experts, torch.randn(TOKENS, HIDDEN, generator=generator), (ids, gates)


def error(experts: list[Expert], x: Tensor, routing: tuple[Tensor, Tensor], goal: Tensor) -> float:
    made = layer_output(experts, x, *routing, SILU)
    return float((made - goal).square().sum() / goal.square().sum())


def test_the_layer_is_the_weighted_sum_of_its_experts() -> None:
    experts, x, (ids, gates) = layer()
    ids = torch.where(ids == 2, -1, ids)  # an expert that is gone

    found = layer_output(experts, x, ids, gates, SILU)

    expected = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for expert, gate in zip(ids[token].tolist(), gates[token].tolist(), strict=True):
            if expert >= 0:
                expected[token] += gate * apply(experts[expert], x[token : token + 1])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("skewed", [False, True])
def test_experts_in_one_tensor_compute_the_same(skewed: bool, biases: bool) -> None:
    """Balanced, where they are padded, and with nearly all tokens at one of many experts."""
    count = 12 if skewed else EXPERTS
    experts = [
        random_expert(NEURONS, HIDDEN, seed, gated=True, biases=biases) for seed in range(count)
    ]
    generator = torch.Generator().manual_seed(1)
    x, gates = torch.randn(TOKENS, HIDDEN, generator=generator), torch.rand(TOKENS, 2)
    ids = torch.stack([torch.arange(TOKENS) % count, torch.arange(1, TOKENS + 1) % count], dim=1)
    if skewed:
        ids[20:, 0], ids[20:, 1] = 3, -1
    tensors = [expert.tensors() for expert in experts]
    stacked = Expert(**{name: torch.stack([t[name] for t in tensors]) for name in tensors[0]})

    found = stacked_output(stacked, x, ids, gates, SILU)

    torch.testing.assert_close(found, layer_output(experts, x, ids, gates, SILU))


def test_no_token_that_is_routed_nowhere_matters() -> None:
    experts, x, (_, gates) = layer()
    stacked = Expert(
        up=torch.stack([e.up for e in experts]), down=torch.stack([e.down for e in experts])
    )

    found = stacked_output(
        stacked, x, torch.full_like(gates, -1, dtype=torch.long), gates, lambda _, up: up
    )

    assert not found.any()


def test_steps_come_nearer_to_the_target() -> None:
    experts, x, routing = layer()
    goal = layer_output(experts, x, *routing, SILU)
    damaged = [replace(each, up=0.7 * each.up, down=each.down.roll(1, 0)) for each in experts]

    errors = [
        error(
            polish(damaged, x, routing, Outputs(goal), SILU, PolishConfig(steps=n)),
            x,
            routing,
            goal,
        )
        for n in (0, 50, 400)
    ]

    assert errors[0] == error(damaged, x, routing, goal)
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.2 * errors[0]


def test_the_same_seed_gives_the_same_bytes() -> None:
    experts, x, routing = layer()
    goal = x.roll(1, 0)

    runs = [
        polish(experts, x, routing, Outputs(goal), SILU, PolishConfig(steps=20, seed=seed))
        for seed in (0, 0, 1)
    ]

    assert all(a.down.equal(b.down) for a, b in zip(runs[0], runs[1], strict=True))
    assert not runs[0][0].down.equal(runs[2][0].down)


def test_what_was_given_is_not_changed() -> None:
    experts, x, routing = layer()
    before = [each.down.clone() for each in experts]

    polish(experts, x, routing, Outputs(x.roll(1, 0)), SILU, PolishConfig(steps=3))

    assert all(each.down.equal(old) for each, old in zip(experts, before, strict=True))


@pytest.mark.parametrize("field", ["rate", "batch"])
def test_impossible_steps_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        PolishConfig.model_validate({field: 0})
