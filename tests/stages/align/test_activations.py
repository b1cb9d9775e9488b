"""Alignment by what neurons do."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.expert import Expert
from stages.align.activations import activation_gain, joint_gain, weight_cosine
from stages.align.matching import align, assignment, gain, matching_gain
from stages.errors import StatisticsError
from tests.tiny import PROPERTY, random_expert, random_input, random_permutation, same

SEEDS = st.integers(0, 999)


def neurons_of(expert: Expert, x: Tensor) -> Tensor:
    """[N, I] what enters the down projection."""
    assert expert.gate is not None
    return F.silu(x @ expert.gate.T) * (x @ expert.up.T)


@PROPERTY
@given(neurons=st.integers(1, 30), seed=SEEDS)
def test_a_permuted_copy_is_recovered_from_its_activations_alone(neurons: int, seed: int) -> None:
    original, x = random_expert(neurons, 8, seed), random_input(64, 8, seed)
    copy = original.permuted(random_permutation(neurons, seed))
    seen = neurons_of(original, x), neurons_of(copy, x)

    assert same(align(original, copy, "activations", seen), original)
    assert same(align(original, copy, "both", seen), original)


@PROPERTY
@given(neurons=st.integers(1, 12), tokens=st.integers(1, 20), seed=SEEDS)
def test_the_gain_is_the_cosine_over_tokens(neurons: int, tokens: int, seed: int) -> None:
    a, b = random_input(tokens, neurons, seed), random_input(tokens, neurons, seed + 1)

    found = activation_gain(a, b)

    expected = F.cosine_similarity(a.T.unsqueeze(1), b.T.unsqueeze(0), dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@PROPERTY
@given(neurons=st.integers(1, 6), seed=SEEDS)
def test_no_permutation_has_nearer_unit_activations(neurons: int, seed: int) -> None:
    a, b = random_input(20, neurons, seed), random_input(20, neurons, seed + 1)
    units = [each / each.norm(dim=0) for each in (a, b)]

    def distance(order: Tensor) -> float:
        return float((units[0] - units[1][:, order]).square().sum())

    best = min(distance(torch.tensor(p)) for p in permutations(range(neurons)))

    assert distance(assignment(activation_gain(a, b))) == pytest.approx(best, rel=1e-4, abs=1e-5)


def test_scaled_neurons_are_the_same_neurons_by_what_they_do() -> None:
    """Doubling a neuron's up row and halving its down column changes no function."""
    original, x = random_expert(16, 4, 0), random_input(200, 4, 1)
    scale = torch.logspace(-2, 2, 16)
    scaled = Expert(
        up=original.up * scale[:, None], gate=original.gate, down=original.down / scale
    ).permuted(random_permutation(16, 2))
    seen = neurons_of(original, x), neurons_of(scaled, x)
    truth = random_permutation(16, 2).argsort()

    assert assignment(gain("activations", original, scaled, seen)).equal(truth)
    assert not assignment(gain("weights", original, scaled, None)).equal(truth)


@PROPERTY
@given(neurons=st.integers(1, 12), seed=SEEDS, gated=st.booleans(), biases=st.booleans())
def test_weight_cosine_counts_everything_that_belongs_to_a_neuron(
    neurons: int, seed: int, gated: bool, biases: bool
) -> None:
    a, b = (random_expert(neurons, 5, s, gated=gated, biases=biases) for s in (seed, seed + 1))
    norms = [matching_gain(each, each).diagonal().sqrt() for each in (a, b)]

    expected = matching_gain(a, b) / torch.outer(*norms)

    torch.testing.assert_close(weight_cosine(a, b), expected, rtol=1e-4, atol=1e-5)


def test_both_is_the_sum_of_both_cosines() -> None:
    a, b = random_expert(6, 4, 0), random_expert(6, 4, 1)
    x = random_input(9, 4, 2)
    seen = neurons_of(a, x), neurons_of(b, x)

    expected = activation_gain(*seen) + weight_cosine(a, b)

    torch.testing.assert_close(joint_gain(a, b, *seen), expected)
    torch.testing.assert_close(gain("both", a, b, seen), expected)


def test_silent_neurons_are_like_nothing_and_break_nothing() -> None:
    a, b = random_input(10, 4, 0), random_input(10, 4, 1)
    a[:, 2] = 0

    found = activation_gain(a, b)

    assert found.isfinite().all()
    assert (found[2] == 0).all()
    assert assignment(found).sort().values.equal(torch.arange(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_do_not_overflow(dtype: torch.dtype) -> None:
    a = (random_input(400, 4, 0) * 200).to(dtype)

    found = activation_gain(a, a)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.diagonal(), torch.ones(4))


def test_activations_that_were_not_taken_are_asked_for() -> None:
    a, b = random_expert(4, 4, 0), random_expert(4, 4, 1)

    with pytest.raises(StatisticsError, match=r"align.by=both needs"):
        align(a, b, "both")
