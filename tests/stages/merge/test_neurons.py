"""Pooled neurons: what is planted comes back, and no choice of as many neurons does better."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.expert import Expert
from models.expert_function import activation, activations
from stages.merge.neurons import Pooled, pool
from tests.tiny import PROPERTY, random_expert, random_input, random_permutation

HIDDEN, NEURONS, TOKENS = 6, 4, 160
SILU = activation({"hidden_act": "silu"})
Routing = tuple[Tensor, Tensor]


def routed(members: int, seed: int, others: int = 1) -> Routing:
    """Top 2 of the members and of experts that are none: those have a negative id."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, members + others, generator=generator)
    gates, ids = logits.softmax(dim=-1).topk(2)
    return torch.where(ids >= members, -1, ids), gates


def both(share: float = 0.5) -> Routing:
    ids = torch.tensor([[0, 1]]).expand(TOKENS, 2)
    return ids, torch.tensor([[share, 1 - share]]).expand(TOKENS, 2)


def outputs(experts: list[Expert], x: Tensor, routing: Routing) -> Tensor:
    """[N, H] fp64 what the members add up to."""
    total = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    ids, gates = routing
    for index, expert in enumerate(experts):
        gate = (gates * (ids == index)).sum(dim=1).double()
        made = activations(expert, x, SILU).double() @ expert.down.T.double()
        total += gate[:, None] * made
    return total


def grouped(expert: Expert, x: Tensor, routing: Routing) -> Tensor:
    """[N, H] what one expert does under the sum of the members' gates."""
    ids, gates = routing
    return outputs([expert], x, (torch.where(ids >= 0, 0, -1), gates))


def pooled(experts: list[Expert], x: Tensor, routing: Routing, ridge: float = 1e-9) -> Pooled:
    found = pool(experts, x, routing, [1.0] * len(experts), SILU, NEURONS, ridge)
    assert found is not None
    return found


@PROPERTY
@given(seed=st.integers(0, 999), members=st.integers(2, 3))
def test_copies_with_their_neurons_in_any_order_give_the_common_function(
    seed: int, members: int
) -> None:
    original, x = random_expert(NEURONS, HIDDEN, seed, gated=True), random_input(TOKENS, HIDDEN, 1)
    experts = [original.permuted(random_permutation(NEURONS, seed + i)) for i in range(members)]
    routing = routed(members, seed)

    found = pooled(experts, x, routing)

    assert found.error <= 1e-6 * found.energy
    made, goal = grouped(found.expert, x, routing), outputs(experts, x, routing)
    assert float((made - goal).norm()) <= 1e-2 * float(goal.norm())


def test_the_neurons_that_do_something_are_taken_from_all_members() -> None:
    """Half of each member's neurons put nothing out; averaging cannot keep the other halves."""
    x, dead = random_input(TOKENS, HIDDEN, 3), [torch.arange(2), torch.arange(2, 4)]
    experts = []
    for seed, gone in enumerate(dead):
        expert = random_expert(NEURONS, HIDDEN, seed, gated=True)
        experts.append(replace(expert, down=expert.down.index_fill(1, gone, 0.0)))

    found = pooled(experts, x, both())

    assert found.members.tolist() == [0, 0, 1, 1]
    assert found.error <= 1e-6 * found.energy


@pytest.mark.parametrize("seed", range(3))
def test_hardly_any_choice_of_as_many_neurons_is_better(seed: int) -> None:
    """The oracle tries all 70; neurons go one by one, so that the best is not always found."""
    experts = [random_expert(NEURONS, HIDDEN, 10 * seed + i, gated=True) for i in range(2)]
    x, routing = random_input(TOKENS, HIDDEN, seed), routed(2, seed)

    found = pooled(experts, x, routing)

    ids, gates = routing
    gate = (gates * (ids >= 0)).sum(dim=1).double()[:, None]
    neurons = torch.cat([activations(each, x, SILU).double() for each in experts], dim=1) * gate
    goal = outputs(experts, x, routing)
    errors = []
    for kept in combinations(range(2 * NEURONS), NEURONS):
        some = neurons[:, list(kept)]
        left = goal - some @ torch.linalg.lstsq(some, goal, driver="gelsd").solution
        errors.append(float(left.square().sum()))
    assert found.error == pytest.approx(min(errors, key=lambda e: abs(e - found.error)), rel=1e-3)
    assert sum(each < found.error * (1 - 1e-3) for each in errors) <= 3


def test_biases_of_neurons_move_with_them_and_those_of_outputs_are_averaged() -> None:
    experts = [random_expert(NEURONS, HIDDEN, i, gated=True, biases=True) for i in range(2)]
    x, routing = random_input(TOKENS, HIDDEN, 0), both()

    found = pool(experts, x, routing, [3.0, 1.0], SILU, NEURONS, 0.01)

    assert found is not None
    known = {tuple(each.up_bias[:1].tolist()) for e in experts for each in _neurons(e)}
    assert {tuple(each.up_bias[:1].tolist()) for each in _neurons(found.expert)} <= known
    first, second = (each.down_bias for each in experts)
    assert first is not None and second is not None
    torch.testing.assert_close(found.expert.down_bias, 0.75 * first + 0.25 * second)


def _neurons(expert: Expert) -> list[Expert]:
    return [expert.select(torch.tensor([n])) for n in range(expert.neurons)]


def test_fewer_tokens_than_neurons_are_refused() -> None:
    experts = [random_expert(NEURONS, HIDDEN, i, gated=True) for i in range(2)]
    ids = torch.full((TOKENS, 2), -1)
    ids[: NEURONS - 1, 0] = 0

    found = pool(
        experts, random_input(TOKENS, HIDDEN, 0), (ids, torch.ones(TOKENS, 2)), [1.0, 1.0],
        SILU, NEURONS, 0.01,
    )  # fmt: skip

    assert found is None


def test_bytes_depend_on_the_input_alone() -> None:
    experts = [random_expert(NEURONS, HIDDEN, i, gated=True) for i in range(3)]
    x, routing = random_input(TOKENS, HIDDEN, 0), routed(3, 0)

    first, again = (pooled(experts, x, routing, 0.01).expert for _ in range(2))

    assert all(
        a.equal(b) for a, b in zip(first.tensors().values(), again.tensors().values(), strict=True)
    )
