"""What is kept of S: whole rows or columns, the most important ones, and nothing in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.compress.sparse import cut, importance, kept_count, strongest
from tests.tiny import PROPERTY, random_input

AXES = st.sampled_from(["rows", "columns"])
SIZES = {"height": st.integers(1, 12), "width": st.integers(1, 12), "seed": st.integers(0, 99)}


def slow_importance(rest: Tensor, axis: str, x: Tensor) -> list[float]:
    """The squared error over all tokens when one row or column of S alone is dropped."""
    full = x @ rest.T
    found = []
    for i in range(rest.shape[0 if axis == "rows" else 1]):
        without = rest.clone()
        if axis == "rows":
            without[i] = 0
        else:
            without[:, i] = 0
        found.append(float((full - x @ without.T).square().sum()))
    return found


def masked(rest: Tensor, axis: Any, index: Tensor) -> Tensor:
    """S [H, W] with everything but the chosen rows or columns set to zero."""
    kept = torch.zeros_like(rest)
    turned = kept if axis == "rows" else kept.T
    turned.index_copy_(0, index, cut(rest, axis, index))
    return kept


@PROPERTY
@given(axis=AXES, tokens=st.integers(1, 9), **SIZES)
def test_importance_by_activations_is_the_error_of_dropping_one(
    axis: str, tokens: int, height: int, width: int, seed: int
) -> None:
    rest = random_input(height, width, seed, torch.float64)
    x = random_input(tokens, width, seed + 1, torch.float64)

    found = importance(rest, axis, x)

    assert found.tolist() == pytest.approx(slow_importance(rest, axis, x), rel=1e-9, abs=1e-12)


@PROPERTY
@given(axis=AXES, **SIZES)
def test_without_a_token_the_norms_decide(axis: str, height: int, width: int, seed: int) -> None:
    """An expert that nothing was routed to has an order of its own, and no NaN."""
    rest = random_input(height, width, seed)

    found = importance(rest, axis, rest.new_empty(0, width))

    assert found.equal(importance(rest, axis))
    assert found.tolist() == pytest.approx(
        [float(each.norm() ** 2) for each in (rest if axis == "rows" else rest.T)], rel=1e-5
    )


@PROPERTY
@given(data=st.data(), axis=AXES, **SIZES)
def test_whole_rows_or_columns_are_zero_and_the_others_untouched(
    data: st.DataObject, axis: str, height: int, width: int, seed: int
) -> None:
    rest = random_input(height, width, seed)
    along = height if axis == "rows" else width
    count = data.draw(st.integers(0, along))
    index = strongest(importance(rest, axis), count)

    kept = masked(rest, axis, index)

    lines, original = (kept, rest) if axis == "rows" else (kept.T, rest.T)
    for i in range(along):
        assert lines[i].equal(original[i] if i in index else torch.zeros_like(original[i]))
    assert cut(rest, axis, index).equal(original[index])
    weakest_kept = min((float(original[i].norm()) for i in index), default=torch.inf)
    strongest_lost = max(
        (float(original[i].norm()) for i in range(along) if i not in index), default=0.0
    )
    assert len(index) == count and strongest_lost <= weakest_kept * (1 + 1e-5)


def test_ties_go_to_the_lower_index() -> None:
    assert strongest(torch.tensor([1.0, 2, 1, 2, 1]), 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("share", "size", "count"),
    [(0.0, 7, 0), (1.0, 7, 7), (0.1, 768, 77), (0.1, 3072, 307), (0.5, 3, 2), (0.1, 4, 0)],
)
def test_the_share_is_rounded_to_whole_rows(share: float, size: int, count: int) -> None:
    assert kept_count(share, size) == count


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        kept_count(share, 4)
