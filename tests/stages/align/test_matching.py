"""Alignment finds the best permutation, and finds it exactly."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.expert import Expert
from stages.align.matching import align, assignment, matching_gain, squared_distance
from tests.tiny import PROPERTY, random_expert, random_permutation, same

KINDS = {"gated": st.booleans(), "biases": st.booleans()}
SEEDS = st.integers(0, 999)


def trace(gain: torch.Tensor, permutation: torch.Tensor) -> float:
    return float(gain.double()[torch.arange(len(gain)), permutation].sum())


@PROPERTY
@given(neurons=st.integers(1, 40), seed=SEEDS, **KINDS)
def test_a_permuted_copy_aligns_to_the_original_bit_for_bit(
    neurons: int, seed: int, gated: bool, biases: bool
) -> None:
    original = random_expert(neurons, 8, seed, gated=gated, biases=biases)
    permutation = random_permutation(neurons, seed)

    copy = original.permuted(permutation)

    assert assignment(matching_gain(original, copy)).equal(permutation.argsort())
    assert same(align(original, copy), original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_recovery_works_in_every_storage_type(dtype: torch.dtype) -> None:
    original = random_expert(64, 16, 0, dtype=dtype)

    assert same(align(original, original.permuted(random_permutation(64, 1))), original)


@PROPERTY
@given(neurons=st.integers(2, 30), seed=SEEDS, noise=st.floats(0, 0.2))
def test_recovery_survives_noise(neurons: int, seed: int, noise: float) -> None:
    original = random_expert(neurons, 24, seed)
    other = random_expert(neurons, 24, seed + 1)
    permutation = random_permutation(neurons, seed)
    pairs = zip(original.tensors().items(), other.tensors().values(), strict=True)
    noisy = Expert(**{name: a + noise * b for (name, a), b in pairs})

    found = assignment(matching_gain(original, noisy.permuted(permutation)))

    assert found.equal(permutation.argsort())


@PROPERTY
@given(neurons=st.integers(1, 6), seed=SEEDS, **KINDS)
def test_small_cases_equal_brute_force(neurons: int, seed: int, gated: bool, biases: bool) -> None:
    a, b = (random_expert(neurons, 3, s, gated=gated, biases=biases) for s in (seed, seed + 1))
    gain = matching_gain(a, b)

    best = max(trace(gain, torch.tensor(p)) for p in permutations(range(neurons)))

    assert trace(gain, assignment(gain)) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_assignment_beats_identity_and_a_thousand_permutations(seed: int) -> None:
    gain = matching_gain(random_expert(32, 8, seed), random_expert(32, 8, seed + 10))

    best = trace(gain, assignment(gain))

    assert best >= trace(gain, torch.arange(32))
    assert all(best >= trace(gain, random_permutation(32, other)) for other in range(1000))


@pytest.mark.parametrize("seed", range(5))
def test_the_solver_is_needed_for_unrelated_experts(seed: int) -> None:
    """The shortcut for unique row maxima must not answer here, or the solver is never tested."""
    gain = matching_gain(random_expert(32, 8, seed), random_expert(32, 8, seed + 10))

    assert len(set(gain.argmax(dim=1).tolist())) < 32
    assert assignment(gain).sort().values.equal(torch.arange(32))


@PROPERTY
@given(neurons=st.integers(1, 30), seed=SEEDS, **KINDS)
def test_aligning_never_increases_the_squared_distance(
    neurons: int, seed: int, gated: bool, biases: bool
) -> None:
    a, b = (random_expert(neurons, 5, s, gated=gated, biases=biases) for s in (seed, seed + 1))

    assert squared_distance(a, align(a, b)) <= squared_distance(a, b) * (1 + 1e-6)


@PROPERTY
@given(neurons=st.integers(1, 20), seed=SEEDS, **KINDS)
def test_the_gain_is_what_alignment_saves(
    neurons: int, seed: int, gated: bool, biases: bool
) -> None:
    """|a - p(b)|^2 = |a|^2 + |b|^2 - 2 trace(gain p): gate, up, down and biases all count."""
    a, b = (random_expert(neurons, 5, s, gated=gated, biases=biases) for s in (seed, seed + 1))
    permutation = random_permutation(neurons, seed)

    saved = squared_distance(a, b) - squared_distance(a, b.permuted(permutation))

    gain = matching_gain(a, b)
    expected = 2 * (trace(gain, permutation) - trace(gain, torch.arange(neurons)))
    assert saved == pytest.approx(expected, abs=1e-3)


@PROPERTY
@given(neurons=st.integers(1, 40), seed=SEEDS, **KINDS)
def test_an_expert_matches_itself_in_place(
    neurons: int, seed: int, gated: bool, biases: bool
) -> None:
    expert = random_expert(neurons, 8, seed, gated=gated, biases=biases)

    assert assignment(matching_gain(expert, expert)).equal(torch.arange(neurons))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storage_in_half_precision_gives_the_same_matching(dtype: torch.dtype) -> None:
    a, b = (random_expert(24, 16, seed, dtype=dtype) for seed in (0, 1))
    wide = assignment(matching_gain(a.map(torch.Tensor.float), b.map(torch.Tensor.float)))

    assert assignment(matching_gain(a, b)).equal(wide)


def test_the_gain_does_not_overflow_where_half_precision_would() -> None:
    expert = random_expert(8, 64, 0).map(lambda tensor: (tensor * 200).half())

    gain = matching_gain(expert, expert)

    assert gain.dtype == torch.float32
    assert float(gain.max()) > 65504
    assert gain.isfinite().all()


def test_experts_of_different_kinds_are_not_matched() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        matching_gain(random_expert(4, 4, 0), random_expert(4, 4, 0, gated=False))


def test_squared_distance_sums_all_tensors() -> None:
    expert = random_expert(2, 3, 0, biases=True)

    moved = expert.map(lambda tensor: tensor + 2)

    elements = sum(tensor.numel() for tensor in expert.tensors().values())
    assert squared_distance(expert, expert) == 0
    assert squared_distance(expert, moved) == pytest.approx(4 * elements)
