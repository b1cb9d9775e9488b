"""docs/uncurl.md shows what its file of results holds, and the file bears out what is safe to say.

Which grouping wins, and whether the safe factor shrinks with the number of experts, is not
asserted: two seeds of small models do not tell.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages import between
from benchmarks.uncurl.cells import PLAIN, ROUTER_ONLY, TWO_STAGE
from benchmarks.uncurl.recipes import GROUPINGS, ROUTERS, SCRATCH
from benchmarks.uncurl.summary import chosen, mean, safe_factors
from benchmarks.uncurl.table import MARKS, tables

REPOSITORY = Path(__file__).resolve().parents[2]
FOUND: dict[str, Any] = json.loads((REPOSITORY / "docs/results/uncurl.json").read_text())
ROWS = FOUND["rows"]
TASK, OTHER = FOUND["setup"]["tasks"]
SIZES = {int(experts): kept for experts, kept in FOUND["setup"]["kept"].items()}


def at_once(recipe: str, experts: int, kept: int, task: str = TASK, of: str = TASK) -> float:
    """Mean loss over the seeds on a task, by statistics of another or the same."""
    (row,) = chosen(ROWS, tuning=PLAIN, recipe=recipe, experts=experts, kept=kept, task=of)
    return mean(row["losses"]["before"][task])


def test_the_page_holds_exactly_the_tables_of_the_file() -> None:
    page = (REPOSITORY / "docs" / "uncurl.md").read_text()
    assert between(page, MARKS, tables(FOUND)) == page
    assert FOUND["safe_factors"] == safe_factors(ROWS, TASK)
    assert (REPOSITORY / "docs" / "images" / "uncurl.png").stat().st_size > 10_000


def test_every_number_is_of_all_seeds() -> None:
    seeds = FOUND["setup"]["seeds"]
    assert all(sorted(row["seeds"]) == seeds for row in ROWS)
    assert {row["recipe"] for row in chosen(ROWS, tuning=PLAIN)} == {SCRATCH, *GROUPINGS}
    assert {row["recipe"] for row in chosen(ROWS, tuning=ROUTER_ONLY)} == set(ROUTERS)
    assert chosen(ROWS, tuning=TWO_STAGE, recipe=SCRATCH)


@pytest.mark.parametrize("experts", SIZES)
@pytest.mark.parametrize("recipe", GROUPINGS)
def test_fewer_experts_cost_more_but_for_a_hundredth(recipe: str, experts: int) -> None:
    losses = [at_once(recipe, experts, kept) for kept in sorted(SIZES[experts], reverse=True)]
    assert all(fewer > more - 0.01 for more, fewer in pairwise(losses))
    assert losses[-1] > losses[0] or len(losses) < 3


@pytest.mark.parametrize(
    ("experts", "kept"), [(e, k) for e, sizes in SIZES.items() for k in sizes if e // k >= 8]
)
def test_merging_beats_dropping_at_large_factors(experts: int, kept: int) -> None:
    dropped = at_once("frequency prune", experts, kept)
    assert at_once("frequency merge", experts, kept) < dropped
    assert at_once("uncurl", experts, kept) < dropped


@pytest.mark.parametrize(("experts", "kept"), [(e, k) for e, sizes in SIZES.items() for k in sizes])
def test_alignment_helps(experts: int, kept: int) -> None:
    assert at_once("uncurl", experts, kept) < at_once("uncurl, not aligned", experts, kept)


@pytest.mark.parametrize("recipe", ["uncurl, diagonal kept", "frequency merge", "frequency prune"])
def test_statistics_of_the_task_serve_it_better_than_those_of_another(recipe: str) -> None:
    (row,) = chosen(ROWS, tuning=PLAIN, recipe=recipe, task=OTHER)
    size = row["experts"], row["kept"]
    assert at_once(recipe, *size, TASK, TASK) < at_once(recipe, *size, TASK, OTHER)
    assert at_once(recipe, *size, OTHER, OTHER) < at_once(recipe, *size, OTHER, TASK)


def test_a_router_that_is_kept_or_averaged_beats_one_that_is_drawn_anew() -> None:
    routers = {row["recipe"]: row["losses"] for row in chosen(ROWS, tuning=ROUTER_ONLY)}
    for mark in routers["uncurl, paper"]:
        anew = mean(routers["uncurl, paper"][mark][TASK])
        for name in ("uncurl, remapped", "uncurl, mean"):
            assert mean(routers[name][mark][TASK]) < anew


@pytest.mark.parametrize("planted", FOUND["planted"], ids=lambda row: f"seed {row['seed']}")
def test_planted_copies_are_found_and_merged_without_loss(planted: dict[str, Any]) -> None:
    assert set(planted["uncurl, diagonal kept"]["adjusted_rand"]) == {1.0}
    assert max(planted["uncurl"]["adjusted_rand"]) < 1
    for task, loss in planted["original"]["losses"].items():
        found = planted["uncurl, diagonal kept"]["losses"][task]
        assert found == pytest.approx(loss, abs=1e-4)
        assert planted["frequency prune"]["losses"][task] > loss + 1e-3
