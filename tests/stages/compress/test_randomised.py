"""The randomised factors: near the exact ones, within their stated bound, always the same."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.compress.randomised import bound_factor, randomised_svd, worthwhile
from tests.tiny import PROPERTY, random_input


@PROPERTY
@given(rank=st.integers(1, 12), tall=st.booleans(), seed=st.integers(0, 99))
def test_the_error_lies_within_the_bound(rank: int, tall: bool, seed: int) -> None:
    """Of the expectation, for a spectrum that falls slowly; the powers leave room to spare."""
    matrix = random_input(40, 64, seed, torch.float64)
    matrix = matrix.T if tall else matrix

    left, values, right = randomised_svd(matrix, rank, seed)

    best = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
    error = (matrix - left * values @ right).norm()
    assert best * (1 - 1e-9) <= error <= best * bound_factor(rank)


@PROPERTY
@given(rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_matrix_of_that_rank_is_found_exactly(rank: int, seed: int) -> None:
    matrix = random_input(30, rank, seed, torch.float64) @ random_input(
        rank, 20, seed + 1, torch.float64
    )

    left, values, right = randomised_svd(matrix, rank)

    torch.testing.assert_close(left * values @ right, matrix, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))


def test_the_same_seed_gives_the_same_bits() -> None:
    matrix = random_input(50, 40, 0)

    first, second = randomised_svd(matrix, 5), randomised_svd(matrix, 5)

    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_without_memory_the_shapes_are_known() -> None:
    left, values, right = randomised_svd(torch.empty(14336, 4096, device="meta"), 32)

    assert (left.shape, values.shape, right.shape) == ((14336, 32), (32,), (32, 4096))


def test_it_is_taken_where_the_rank_is_small() -> None:
    assert worthwhile(32, torch.Size([4096, 14336]))
    assert not worthwhile(512, torch.Size([4096, 14336]))
