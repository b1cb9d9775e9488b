"""A divided budget against every possible division."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import BudgetError
from stages.group.divide import divide, steps
from tests.tiny import PROPERTY

Array = np.ndarray[Any, Any]
COSTS = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5, np.inf]), min_size=2, max_size=5),
    min_size=1,
    max_size=4,
)


def brute(costs: list[list[float]], total: int) -> float:
    """The least sum of all divisions; inf where there is none."""
    return min(
        (
            sum(cost[size] for cost, size in zip(costs, sizes, strict=True))
            for sizes in product(*(range(len(cost)) for cost in costs))
            if sum(sizes) <= total
        ),
        default=np.inf,
    )


@PROPERTY
@given(costs=COSTS, total=st.integers(0, 16))
def test_no_division_costs_less(costs: list[list[float]], total: int) -> None:
    arrays = [np.array(cost) for cost in costs]
    least = brute(costs, total)
    if not np.isfinite(least):
        if all(np.isfinite(cost).any() for cost in arrays):
            with pytest.raises(BudgetError, match="which need"):
                divide(arrays, total)
        return
    found = divide(arrays, total)
    assert sum(found) <= total
    assert sum(cost[size] for cost, size in zip(costs, found, strict=True)) == least


@PROPERTY
@given(total=st.integers(2, 40), scale=st.floats(1, 100))
def test_layers_alike_share_alike_and_a_damaged_one_gets_more(total: int, scale: float) -> None:
    cost = np.r_[np.inf, 1 / np.arange(1, 21)]
    even = divide([cost, cost], total)
    assert abs(even[0] - even[1]) <= 1 and sum(even) == min(total, 40)
    first, second = divide([scale * cost, cost], total)
    assert first >= second - 1


def test_a_curve_is_a_line_between_sizes_and_never_falls_with_fewer_neurons() -> None:
    found = steps({4: 3.0, 8: 1.0, 12: 1.5}, full=16, step=2)
    np.testing.assert_allclose(found, [np.inf, np.inf, 3.0, 2.25, 1.5, 1.5, 1.5, 0.75, 0.0])
