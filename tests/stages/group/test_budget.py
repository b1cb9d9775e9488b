"""A budget is met to the last expert, whatever the frequencies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.errors import BudgetError
from stages.group.budget import Array, Sizes, adaptive, by_rank, total_experts, uniform
from stages.group.config import Budget
from tests.tiny import PROPERTY

SIZES = Sizes(fixed=1000, per_expert=100, layers=4)


@st.composite
def frequencies(draw: st.DrawFn) -> dict[int, Array]:
    """Row-normalised counts with many ties and unused experts."""
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    found: dict[int, Array] = {}
    for layer in range(layers):
        counts = np.array(draw(st.lists(st.integers(0, 4), min_size=experts, max_size=experts)))
        found[layer] = counts / max(counts.sum(), 1)
    return found


def kept_sets(total: int, frequency: dict[int, Array], minimum: int) -> set[tuple[int, int]]:
    kept = adaptive(total, frequency, minimum)
    return {
        (layer, int(expert))
        for layer, values in frequency.items()
        for expert in by_rank(values)[: kept[layer]]
    }


@PROPERTY
@given(frequency=frequencies(), data=st.data())
def test_the_global_budget_is_spent_exactly_within_the_limits(
    frequency: dict[int, Array], data: st.DataObject
) -> None:
    experts = len(frequency[0])
    minimum = data.draw(st.integers(1, experts))
    total = data.draw(st.integers(minimum * len(frequency), experts * len(frequency)))

    kept = adaptive(total, frequency, minimum)

    assert sum(kept.values()) == total
    assert all(minimum <= count <= experts for count in kept.values())


def test_uniform_frequencies_do_not_lose_the_budget_to_ties() -> None:
    frequency = {layer: np.full(8, 1 / 8) for layer in range(2)}

    kept = adaptive(8, frequency, 1)

    assert sum(kept.values()) == 8
    # Ties go to the lower layer: its minimum, and all but the other layer's minimum.
    assert kept == {0: 7, 1: 1}


def test_a_budget_beyond_the_used_experts_is_still_met() -> None:
    frequency = {layer: np.array([0.5, 0.5, 0, 0, 0, 0]) for layer in range(2)}

    assert sum(adaptive(9, frequency, 1).values()) == 9


def test_keeping_everything_is_possible() -> None:
    frequency = {0: np.array([0.9, 0.1, 0.0]), 1: np.array([1 / 3] * 3)}

    assert adaptive(6, frequency, 1) == {0: 3, 1: 3}


@PROPERTY
@given(frequency=frequencies(), data=st.data())
def test_the_best_of_each_layer_and_then_the_best_of_all_are_kept(
    frequency: dict[int, Array], data: st.DataObject
) -> None:
    layers, experts = len(frequency), len(frequency[0])
    total = data.draw(st.integers(layers, experts * layers))
    first = {(layer, int(np.argmax(values))) for layer, values in frequency.items()}
    rest = sorted(
        (-values[expert], layer, expert)
        for layer, values in frequency.items()
        for expert in range(experts)
        if (layer, expert) not in first
    )

    expected = first | {(layer, expert) for _, layer, expert in rest[: total - layers]}

    assert kept_sets(total, frequency, 1) == expected


@PROPERTY
@given(frequency=frequencies(), data=st.data())
def test_a_larger_budget_only_adds_experts(
    frequency: dict[int, Array], data: st.DataObject
) -> None:
    layers, experts = len(frequency), len(frequency[0])
    minimum = data.draw(st.integers(1, experts))
    total = data.draw(st.integers(minimum * layers, experts * layers))

    smaller = kept_sets(total, frequency, minimum)

    assert smaller <= kept_sets(min(total + 1, experts * layers), frequency, minimum)


def test_a_minimum_above_the_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="cannot keep 3 in each of 2 layers"):
        adaptive(5, {0: np.ones(4) / 4, 1: np.ones(4) / 4}, 3)


@PROPERTY
@given(total=st.integers(4, 64), layers=st.integers(1, 4))
def test_the_uniform_budget_is_the_largest_equal_share(total: int, layers: int) -> None:
    kept = uniform(total, range(layers), 8)

    count = kept[0]
    assert set(kept.values()) == {count}
    assert count * layers <= total
    assert count == 8 or (count + 1) * layers > total


def test_ranks_break_ties_by_id() -> None:
    assert by_rank(np.array([0.1, 0.3, 0.3, 0.1, 0.2])).tolist() == [1, 2, 4, 0, 3]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(experts_per_layer=3), 12),
        (Budget(experts_per_layer=2.5), 10),
        (Budget(experts_per_layer=2.125), 9),  # 8.5: halves go up
        (Budget(experts_per_layer=2.1), 8),
        (Budget(keep_ratio=0.5), 16),
        (Budget(keep_ratio=0.3), 10),  # 9.6
        (Budget(keep_ratio=1.0), 32),
        (Budget(target_bytes=2000), 10),
        (Budget(target_bytes=2099), 10),
        (Budget(target_bytes=10**9), 32),
    ],
)
def test_each_kind_of_budget_gives_a_total(budget: Budget, expected: int) -> None:
    assert total_experts(budget, 4, 8, SIZES) == expected


def test_decimal_ratios_are_taken_as_written() -> None:
    """0.29 * 50 is 14.499999999999998 in binary: it is 14.5, and halves go up."""
    assert total_experts(Budget(keep_ratio=0.29), 5, 10, SIZES) == 15


def test_a_budget_in_bytes_pays_for_skipped_layers_first() -> None:
    """One of four layers is skipped: its 8 experts stay and are part of the file."""
    everything = SIZES.fixed + 4 * 8 * SIZES.per_expert

    assert total_experts(Budget(target_bytes=everything), 3, 8, SIZES) == 24
    assert total_experts(Budget(target_bytes=everything - 500), 3, 8, SIZES) == 19


@pytest.mark.parametrize(
    "budget",
    [Budget(experts_per_layer=0.5), Budget(keep_ratio=0.05), Budget(target_bytes=1399)],
)
def test_fewer_than_one_expert_per_layer_is_refused(budget: Budget) -> None:
    with pytest.raises(BudgetError, match="experts for 4 layers"):
        total_experts(budget, 4, 8, SIZES)


def test_more_experts_than_the_model_has_are_refused() -> None:
    with pytest.raises(BudgetError, match="asks for 36 experts, the model has 32"):
        total_experts(Budget(experts_per_layer=9), 4, 8, SIZES)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"keep_ratio": 0.5, "target_bytes": 5},
        {"keep_ratio": 0},
        {"keep_ratio": 1.5},
        {"experts_per_layer": float("inf")},
        {"experts_per_layer": float("nan")},
        {"target_bytes": 0},
    ],
    ids=str,
)
def test_a_budget_that_says_nothing_or_too_much_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate(fields)
