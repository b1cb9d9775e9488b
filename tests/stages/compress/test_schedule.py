"""The kept share of S falls from 1 to its target, without a jump."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.compress.schedule import kept_share
from tests.tiny import PROPERTY


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, int | float]:
    warmup, fall, final = (
        draw(st.integers(0, 50)),
        draw(st.integers(1, 200)),
        draw(st.integers(0, 50)),
    )
    target = draw(st.floats(0, 1))
    return {"total": warmup + fall + final, "warmup": warmup, "final": final, "target": target}


def curve(total: int, warmup: int, final: int, target: float) -> list[float]:
    return [kept_share(step, total, warmup, final, target) for step in range(total + 1)]


@PROPERTY
@given(schedule=schedules())
def test_everything_is_kept_during_the_warm_up(schedule: dict[str, int]) -> None:
    assert set(curve(**schedule)[: schedule["warmup"] + 1]) == {1.0}


@PROPERTY
@given(schedule=schedules())
def test_the_target_is_kept_at_the_end(schedule: dict[str, int]) -> None:
    shares = curve(**schedule)

    assert set(shares[schedule["total"] - schedule["final"] :]) == {schedule["target"]}


@PROPERTY
@given(schedule=schedules())
def test_the_share_never_rises_and_stays_in_range(schedule: dict[str, int]) -> None:
    shares = curve(**schedule)

    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(shares))
    assert all(schedule["target"] - 1e-12 <= share <= 1 for share in shares)


@PROPERTY
@given(schedule=schedules())
def test_no_step_falls_by_more_than_the_steepest_slope(schedule: dict[str, int]) -> None:
    """The cubic is steepest where it starts, at 3 (1 - P_T) per length of the fall."""
    shares = curve(**schedule)
    fall = schedule["total"] - schedule["warmup"] - schedule["final"]
    steepest = 3 * (1 - schedule["target"]) / fall

    steps = [earlier - later for earlier, later in pairwise(shares)]

    assert max(steps) <= steepest + 1e-12


def test_half_way_an_eighth_of_the_way_is_left() -> None:
    assert kept_share(50, 100, 0, 0, 0.2) == pytest.approx(0.2 + 0.8 / 8)


def test_the_papers_own_phases_start_at_one_and_not_above() -> None:
    """With the numerator as printed this would be 1.655."""
    assert kept_share(400, 10_000, 400, 1600, 0.1) == 1.0
    assert kept_share(401, 10_000, 400, 1600, 0.1) < 1.0


@pytest.mark.parametrize("target", [-0.1, 1.1, float("nan")])
def test_an_impossible_target_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        kept_share(0, 10, 1, 1, target)


@pytest.mark.parametrize(("warmup", "final"), [(6, 5), (-1, 2), (2, -1)])
def test_phases_that_do_not_fit_are_refused(warmup: int, final: int) -> None:
    with pytest.raises(ValueError, match="do not fit into 10"):
        kept_share(0, 10, warmup, final, 0.1)
