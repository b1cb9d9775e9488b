"""The weighted mean of a group: exact where it can be, and within rounding everywhere else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.align.matching import align
from stages.merge.mean import merge, normalised, weighted_mean
from tests.tiny import PROPERTY, apply, random_expert, random_input, random_permutation, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6)


def tensors_of(count: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random_input(4, 5, seed + i, dtype) for i in range(count)]


def ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the floats, one apart for neighbours."""
    bits = tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16).long()
    lowest = torch.iinfo(torch.int32 if tensor.itemsize == 4 else torch.int16).min
    return torch.where(bits < 0, lowest - bits, bits)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("weight", [0.0, 1e-7, 0.3])
def test_a_group_of_one_is_returned_bit_for_bit(dtype: torch.dtype, weight: float) -> None:
    expert = random_expert(5, 4, 0, biases=True, dtype=dtype)
    expert.up[0] = -0.0  # a sum would return +0.0

    assert same(merge([expert], [weight]), expert)


@PROPERTY
@given(weights=WEIGHTS, seed=st.integers(0, 99), neurons=st.integers(1, 16))
def test_copies_up_to_permutation_merge_to_the_common_function(
    weights: list[float], seed: int, neurons: int
) -> None:
    original = random_expert(neurons, 6, seed)
    copies = [original.permuted(random_permutation(neurons, i)) for i in range(len(weights))]
    x = random_input(7, 6, seed)

    merged = merge([align(copies[0], copy) for copy in copies], weights)

    expected = apply(original, x)
    assert float((apply(merged, x) - expected).norm()) <= 1e-5 * float(expected.norm())


def test_copies_merged_without_alignment_are_another_function() -> None:
    original, x = random_expert(16, 8, 0), random_input(64, 8, 1)
    copies = [original.permuted(random_permutation(16, seed)) for seed in range(4)]

    found, expected = apply(merge(copies, [1.0] * 4), x), apply(original, x)

    assert float((found - expected).norm()) > 0.3 * float(expected.norm())


@PROPERTY
@given(weights=WEIGHTS, scale=st.floats(1e-4, 1e4), seed=st.integers(0, 99))
def test_scaling_all_weights_changes_nothing(weights: list[float], scale: float, seed: int) -> None:
    tensors = tensors_of(len(weights), seed)

    scaled = weighted_mean(tensors, [weight * scale for weight in weights])

    torch.testing.assert_close(scaled, weighted_mean(tensors, weights), rtol=1e-6, atol=1e-7)


@PROPERTY
@given(
    count=st.integers(2, 6),
    weight=st.floats(1e-9, 1e9),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)
def test_equal_weights_give_the_plain_mean(
    count: int, weight: float, seed: int, dtype: torch.dtype
) -> None:
    tensors = tensors_of(count, seed, dtype)
    expected = torch.stack(tensors).double().mean(dim=0)

    found = weighted_mean(tensors, [weight] * count)

    assert (ordered(found) - ordered(expected.to(dtype))).abs().max() <= 1


@PROPERTY
@given(
    count=st.integers(2, 6),
    chosen=st.integers(0, 5),
    weight=st.floats(1e-9, 1e9),
    dtype=st.sampled_from(DTYPES),
)
def test_a_one_hot_weight_returns_that_expert_exactly(
    count: int, chosen: int, weight: float, dtype: torch.dtype
) -> None:
    tensors = tensors_of(count, 0, dtype)
    weights = [weight if i == chosen % count else 0.0 for i in range(count)]

    assert weighted_mean(tensors, weights).equal(tensors[chosen % count])


@PROPERTY
@given(weights=WEIGHTS, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_every_entry_lies_between_those_of_the_members(
    weights: list[float], seed: int, dtype: torch.dtype
) -> None:
    tensors = tensors_of(len(weights), seed, dtype)
    stacked = torch.stack(tensors)

    found = weighted_mean(tensors, weights)

    assert (found >= stacked.amin(dim=0)).all()
    assert (found <= stacked.amax(dim=0)).all()


@PROPERTY
@given(
    weights=WEIGHTS,
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    order=st.integers(0, 99),
)
def test_the_order_of_members_costs_at_most_one_rounding_step(
    weights: list[float], seed: int, dtype: torch.dtype, order: int
) -> None:
    tensors = tensors_of(len(weights), seed, dtype)
    shuffled = random_permutation(len(weights), order).tolist()

    found = weighted_mean([tensors[i] for i in shuffled], [weights[i] for i in shuffled])

    distance = ordered(found) - ordered(weighted_mean(tensors, weights))
    assert distance.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    """512 small steps that a half-precision sum would lose."""
    tensors = [torch.ones(1, dtype=dtype)] * 512

    assert weighted_mean(tensors, [1.0] * 512).equal(torch.ones(1, dtype=dtype))


@pytest.mark.parametrize("scale", [1e-6, 1e-12, 1e-300])
def test_no_epsilon_shrinks_rarely_used_experts(scale: float) -> None:
    tensors = tensors_of(2, 0)

    found = weighted_mean(tensors, [scale, 3 * scale])

    torch.testing.assert_close(found, 0.25 * tensors[0] + 0.75 * tensors[1])


def test_a_group_that_was_never_used_falls_back_to_the_plain_mean() -> None:
    tensors = tensors_of(4, 0)

    assert weighted_mean(tensors, [0.0] * 4).equal(weighted_mean(tensors, [1.0] * 4))


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        normalised([1.0, weight])


def test_a_weight_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        weighted_mean(tensors_of(3, 0), [1.0, 1.0])


def test_all_tensors_of_an_expert_are_merged() -> None:
    experts = [random_expert(3, 4, seed, biases=True) for seed in (0, 1)]

    found = merge(experts, [1.0, 3.0]).tensors()

    for name, tensor in found.items():
        a, b = (expert.tensors()[name] for expert in experts)
        torch.testing.assert_close(tensor, 0.25 * a + 0.75 * b)
    assert len(found) == 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_storage_type_is_kept(dtype: torch.dtype) -> None:
    experts = [random_expert(3, 4, seed, dtype=dtype) for seed in (0, 1)]

    assert merge(experts, [1.0, 1.0]).up.dtype == dtype
