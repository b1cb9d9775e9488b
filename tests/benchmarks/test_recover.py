"""The recovery benchmark: its runs are valid, and results of other cases stay in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recover_tuning
from benchmarks.recover import CASES, merged, page_table, recipe
from benchmarks.recover_tuning import TRIALS
from orchestrator.load import validate

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "recover.json"


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_valid_run(name: str, tmp_path: Path) -> None:
    config = validate(recipe(tmp_path, CASES[name], seed=3))
    assert config.recover is not None and config.recover.seed == 3
    assert config.recover.steps == CASES[name].steps
    assert config.recover.teacher.engine == "resident"


def test_rows_that_are_not_measured_again_stay_in_the_order_of_the_cases(tmp_path: Path) -> None:
    names, kept = list(CASES), tmp_path / "recover.json"
    kept.write_text(json.dumps({"rows": [{"case": n, "steps": 1} for n in names[1:]]}))
    new: list[dict[str, Any]] = [{"case": n, "steps": 2} for n in (names[2], names[0])]
    found = merged(kept, new)
    assert [row["case"] for row in found] == names
    assert [row["steps"] for row in found] == [2, 1, 2] + [1] * (len(names) - 3)
    assert merged(None, new) == [new[1], new[0]]


def test_the_page_shows_what_the_files_of_results_hold() -> None:
    page = (RESULTS.parents[1] / "recover.md").read_text()
    assert page_table(json.loads(RESULTS.read_text())) in page
    tuning = json.loads(RESULTS.with_name("recover_tuning.json").read_text())
    assert recover_tuning.page_table(tuning) in page
    assert [(row["case"], row["rate"], row["alpha"]) for row in tuning["rows"]] == list(TRIALS)


def test_the_readme_says_of_recovery_what_the_file_says() -> None:
    rows = {row["case"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    names = ("after_over_original", "before_over_original", "pruned_over_original")
    half, fifth = (
        [100 * (rows[case][name] - 1) for name in names]
        for case in ("half of the experts", "a fifth of the expert bytes")
    )
    readme = " ".join((RESULTS.parents[2] / "README.md").read_text().split())
    assert f"ends {half[0]:.1f} % above its perplexity, {half[1]:.1f} % before recovery" in readme
    assert f"pruned without recovery {half[2]:.0f} %" in readme
    said = f"a fifth of their bytes {fifth[0]:.1f} %, {fifth[1]:.1f} % and {fifth[2]:,.0f} %"
    assert said in readme
