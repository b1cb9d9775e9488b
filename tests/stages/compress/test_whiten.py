"""Whitened factors lose least on the inputs that were seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.compress.lowrank import truncated_factors
from stages.compress.whiten import second_moments, whitened_factors
from tests.tiny import PROPERTY, random_input

SIZES = {"height": st.integers(1, 10), "width": st.integers(1, 10), "seed": st.integers(0, 99)}


@PROPERTY
@given(data=st.data(), **SIZES)
def test_no_factors_of_the_rank_lose_less_on_the_inputs(
    data: st.DataObject, height: int, width: int, seed: int
) -> None:
    """The tail of the singular values of W L, which plain factors cannot beat."""
    rank = data.draw(st.integers(1, min(height, width)))
    weight = random_input(height, width, seed)
    x = random_input(40, width, seed + 1, torch.float64) * torch.logspace(-1, 1, width)
    moments = second_moments(x, 1e-6)

    left, right = whitened_factors(weight, rank, moments)

    def lost(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
        missing = weight.double() - pair[0].double() @ pair[1].double()
        return float((missing @ moments * missing).sum().clamp(min=0).sqrt())

    root = torch.linalg.cholesky(moments)
    tail = torch.linalg.svdvals(weight.double() @ root)[rank:].square().sum().sqrt()
    scale = float((weight.double() @ root).norm())
    assert lost((left, right)) == pytest.approx(float(tail), rel=1e-4, abs=1e-5 * scale)
    assert lost((left, right)) <= lost(truncated_factors(weight, rank)) + 1e-5 * scale
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-3, atol=1e-4)


def test_without_inputs_it_is_the_plain_decomposition() -> None:
    weight = random_input(6, 9, 3)

    left, right = whitened_factors(weight, 4, second_moments(torch.empty(0, 9), 0.01))

    plain_left, plain_right = truncated_factors(weight, 4)
    torch.testing.assert_close(left @ right, plain_left @ plain_right, rtol=1e-4, atol=1e-5)


def test_fewer_tokens_than_columns_need_the_ridge() -> None:
    x = random_input(2, 9, 0)

    with pytest.raises(ValueError, match="ridge above 0"):
        whitened_factors(random_input(6, 9, 1), 3, -second_moments(x, 0.01))
    left, right = whitened_factors(random_input(6, 9, 1), 3, second_moments(x, 0.01))
    assert left.isfinite().all() and right.isfinite().all()


def test_a_zero_matrix_has_zero_factors() -> None:
    left, right = whitened_factors(torch.zeros(4, 5), 2, torch.eye(5, dtype=torch.float64))

    assert not left.any() and not right.any()
