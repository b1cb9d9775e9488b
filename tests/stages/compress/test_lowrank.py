"""W = U V + S: exact before pruning, and U V is the best of its rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.compress.lowrank import (
    fast_factors,
    rank_from_ratio,
    residual,
    stable_rank,
    truncated_factors,
)
from tests.tiny import PROPERTY, random_input

SHAPES = {"height": st.integers(1, 20), "width": st.integers(1, 20), "seed": st.integers(0, 99)}


def at_rank(data: st.DataObject, height: int, width: int) -> int:
    return data.draw(st.integers(1, min(height, width)))


@PROPERTY
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), **SHAPES)
def test_factors_and_residual_restore_the_weight(
    data: st.DataObject, dtype: torch.dtype, height: int, width: int, seed: int
) -> None:
    weight = random_input(height, width, seed, dtype)
    left, right = truncated_factors(weight, at_rank(data, height, width))

    restored = left @ right + residual(weight, left, right)

    torch.testing.assert_close(restored, weight.float(), rtol=1e-5, atol=1e-5)


@PROPERTY
@given(data=st.data(), **SHAPES)
def test_the_error_is_the_tail_of_the_singular_values(
    data: st.DataObject, height: int, width: int, seed: int
) -> None:
    """No rank-r matrix is nearer (Eckart and Young)."""
    weight = random_input(height, width, seed, torch.float64)
    rank = at_rank(data, height, width)

    error = residual(weight, *truncated_factors(weight, rank)).norm()

    tail = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
    assert float(error) == pytest.approx(float(tail), abs=1e-10)


@PROPERTY
@given(data=st.data(), **SHAPES)
def test_the_factors_have_the_asked_rank_and_equal_norms(
    data: st.DataObject, height: int, width: int, seed: int
) -> None:
    rank = at_rank(data, height, width)

    left, right = truncated_factors(random_input(height, width, seed), rank)

    assert (left.shape, right.shape) == ((height, rank), (rank, width))
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=1e-5)


@PROPERTY
@given(data=st.data(), **SHAPES)
def test_the_fast_factors_lose_as_little_as_the_exact_ones(
    data: st.DataObject, height: int, width: int, seed: int
) -> None:
    weight = random_input(height, width, seed)
    rank = at_rank(data, height, width)

    left, right = fast_factors(weight, rank)

    best = residual(weight, *truncated_factors(weight, rank)).norm()
    assert float(residual(weight, left, right).norm()) == pytest.approx(float(best), abs=1e-4)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=1e-4)


@PROPERTY
@given(rank=st.integers(1, 6), true=st.integers(0, 6), tall=st.booleans())
def test_the_fast_factors_of_a_matrix_of_lower_rank_are_that_matrix(
    rank: int, true: int, tall: bool
) -> None:
    weight = random_input(9, true, 1) @ random_input(true, 7, 2)
    weight = weight.T if tall else weight

    left, right = fast_factors(weight, rank)

    assert left.isfinite().all() and right.isfinite().all()
    assert left.shape[1] == rank
    if rank >= true:
        torch.testing.assert_close(left @ right, weight, rtol=1e-4, atol=1e-4)


def test_half_precision_is_factored_in_fp32() -> None:
    weight = random_input(6, 9, 0, torch.bfloat16)

    left, right = truncated_factors(weight, 6)

    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close(left @ right, weight.float(), rtol=1e-5, atol=1e-5)


def test_a_rank_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        truncated_factors(torch.ones(2, 2), 0)


@pytest.mark.parametrize(
    ("ratio", "height", "width", "rank"),
    [
        (0.1, 768, 3072, 62),  # 61.44
        (0.5, 4, 4, 1),
        (0.51, 4, 4, 2),
        (0.3, 10, 10, 2),  # 1.5
        (0.1, 10, 10, 1),
        (0.7, 20, 20, 7),  # exactly 7, though 0.7 * 10 is 7.000000000000001 in sums of tenths
        (1e-9, 4096, 14336, 1),
    ],
)
def test_the_rank_is_the_ratio_rounded_up(ratio: float, height: int, width: int, rank: int) -> None:
    assert rank_from_ratio(ratio, height, width) == rank


@PROPERTY
@given(ratio=st.integers(1, 100), height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_the_rank_is_the_first_that_reaches_the_ratio(ratio: int, height: int, width: int) -> None:
    rank = rank_from_ratio(ratio / 100, height, width)

    assert 100 * rank * (height + width) >= ratio * height * width
    assert 100 * (rank - 1) * (height + width) < ratio * height * width


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_a_ratio_that_is_not_positive_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        rank_from_ratio(ratio, 4, 4)


@PROPERTY
@given(scale=st.floats(1e-3, 1e3), sign=st.sampled_from([-1, 1]), **SHAPES)
def test_stable_rank_does_not_depend_on_the_scale(
    scale: float, sign: int, height: int, width: int, seed: int
) -> None:
    weight = random_input(height, width, seed)

    assert stable_rank(sign * scale * weight) == pytest.approx(stable_rank(weight), rel=1e-5)


@PROPERTY
@given(data=st.data(), **SHAPES)
def test_stable_rank_lies_between_one_and_the_rank(
    data: st.DataObject, height: int, width: int, seed: int
) -> None:
    rank = at_rank(data, height, width)
    weight = random_input(height, rank, seed) @ random_input(rank, width, seed + 1)

    assert 1 - 1e-6 <= stable_rank(weight) <= rank + 1e-4


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.eye(5), 5.0),
        (torch.ones(3, 4), 1.0),
        (torch.diag(torch.tensor([2.0, 1.0])), 1.25),
        (torch.zeros(3, 3), 0.0),
    ],
    ids=["identity", "rank one", "diagonal", "zero"],
)
def test_stable_rank_of_known_matrices(weight: Tensor, expected: float) -> None:
    assert stable_rank(weight) == pytest.approx(expected, rel=1e-6)


def test_stable_rank_of_half_precision_is_computed_in_fp32() -> None:
    weight = torch.eye(64, dtype=torch.float16) * 1e3  # its squares overflow half precision

    assert math.isclose(stable_rank(weight), 64, rel_tol=1e-6)
