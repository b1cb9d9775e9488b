"""Compressed MomentumSMoE: the page shows the file, and says no more than it does."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.momentum_cell import Cell, Place
from benchmarks.momentum_compressed import MARKS, RECIPES, base, recipes, tables
from benchmarks.pages import between
from orchestrator.load import validate

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results" / "momentum_compressed.json"


def found() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def test_the_page_holds_exactly_the_table_of_the_file() -> None:
    page = (REPOSITORY / "docs" / "momentum.md").read_text()
    assert between(page, MARKS, tables(found())) == page


@pytest.mark.parametrize("style", ["post_ln", "pre_ln"])
@pytest.mark.parametrize("variant", ["smoe", "momentum"])
def test_every_kind_has_three_seeds_of_every_recipe(style: str, variant: str) -> None:
    rows = [r for r in found()["rows"] if (r["style"], r["variant"]) == (style, variant)]
    names = {name for name, _ in recipes(Cell(style, 6, 0, variant, 3e-3))}
    assert sorted(row["seed"] for row in rows) == [0, 1, 2]
    assert all(set(row["rises"]) == names for row in rows)


@pytest.mark.parametrize("style", ["post_ln", "pre_ln"])
def test_the_file_bears_out_that_counting_the_gain_pays_in_merging(style: str) -> None:
    rows = [r for r in found()["rows"] if (r["style"], r["variant"]) == (style, "momentum")]
    plain, weighed = (
        mean(row["rises"][name] for row in rows)
        for name in ("merged, one budget", "merged, weighed by gain")
    )
    assert weighed < plain / 2


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_config(tmp_path: Path, name: str) -> None:
    config = base(tmp_path, Place(tmp_path), tmp_path / "cell" / "model", 0)

    asked = validate(config | RECIPES[name])

    assert asked.group.method == RECIPES[name]["group"]["method"]


def test_a_table_has_means_and_the_farthest_seed() -> None:
    first = next(iter(RECIPES))
    rows = [
        {"style": "pre_ln", "variant": "smoe", "seed": seed, "rises": {first: value}}
        for seed, value in enumerate((0.1, 0.2, 0.6))
    ]

    made = tables({"rows": rows}).splitlines()

    assert made[2] == f"| {first} | {mean((0.1, 0.2, 0.6)):.3f} ± 0.300 |"
    assert made[3].endswith("|  |")
