"""Frequency pruning keeps the most used experts and drops the others."""

from __future__ import annotations

from stages.group.config import Frequency
from stages.group.methods.frequency import decide
from tests.tiny import statistics_of


def test_the_most_selected_experts_stay() -> None:
    (found,) = decide(Frequency(), [statistics_of(0, [1, 5, 3, 4])], 2)

    assert found.representatives == (1, 3)
    assert found.group == (None, 0, None, 1)


def test_ties_go_to_the_lower_id() -> None:
    (found,) = decide(Frequency(), [statistics_of(0, [2, 2, 2, 2])], 3)

    assert found.representatives == (0, 1, 2)


def test_what_does_not_divide_evenly_is_left_unspent() -> None:
    found = decide(Frequency(), [statistics_of(i, [1, 2, 3, 4]) for i in range(2)], 5)

    assert [each.representatives for each in found] == [(2, 3), (2, 3)]
