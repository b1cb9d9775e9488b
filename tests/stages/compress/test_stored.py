"""Dropping the zero rows of S and storing the rest changes no bit of anything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.compress.config import CompressConfig
from stages.compress.factor import factor, measured
from stages.compress.lowrank import at_least_fp32, residual
from tests.stages.compress.test_sparse import masked
from tests.tiny import PROPERTY, random_input

SIZES = {"height": st.integers(2, 12), "width": st.integers(2, 12), "seed": st.integers(0, 99)}


@PROPERTY
@given(axis=st.sampled_from(["rows", "columns"]), share=st.sampled_from([0.0, 0.4, 1.0]), **SIZES)
def test_rows_and_their_index_are_s_with_zeros_to_the_last_bit(
    axis: str, share: float, height: int, width: int, seed: int
) -> None:
    weight = random_input(height, width, seed)
    made = factor(weight, CompressConfig(rank=1, sparse=share, axis=axis))

    rest = residual(weight, made.left, made.right)
    written = made.left @ made.right + masked(rest, axis, made.index)

    assert made.dense().equal(written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decided_number_of_rows_is_kept_and_the_strongest_come_first(dtype: torch.dtype) -> None:
    weight, config = random_input(9, 7, 3, dtype), CompressConfig(rank=2, sparse=0.5)
    order = measured(weight, config).scores.argsort(descending=True)

    for count in (0, 1, 5, 9):
        made = factor(weight, config, None, count)
        assert made.index.tolist() == sorted(order[:count].tolist())
        assert ("s" in made.tensors()) == bool(count)


def test_rows_of_equal_worth_are_kept_from_the_first_on() -> None:
    """U V takes the first direction whole; all rows of S are alike."""
    weight = torch.diag(torch.tensor([9.0, 1, 1, 1, 1]))

    found = measured(weight, CompressConfig(rank=1, sparse=0.4, multiple=1))

    assert found.factored.index.tolist() == [1, 2]
    assert found.scores.tolist() == pytest.approx([0, 1, 1, 1, 1], abs=1e-5)
    assert found.energy == pytest.approx(85)
    assert residual(
        weight, at_least_fp32(found.factored.left), at_least_fp32(found.factored.right)
    ).norm() == pytest.approx(2)
