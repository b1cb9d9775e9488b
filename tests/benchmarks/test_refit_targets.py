"""The benchmark of the refit's targets, and that the docs show what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages import between
from benchmarks.refit_targets import BLOCK, MARKS, TargetCell, cells, summary, table
from stages.refit.config import RefitConfig

REPOSITORY = Path(__file__).resolve().parents[2]
FOUND: dict[str, Any] = json.loads((REPOSITORY / "docs/results/refit_targets.json").read_text())


def test_the_docs_hold_exactly_the_table_of_the_file() -> None:
    page = (REPOSITORY / "docs" / "reduction.md").read_text()
    assert between(page, MARKS, table(FOUND["rows"])) == page


def test_every_target_is_measured_at_every_ratio_and_no_two_cells_share_a_file() -> None:
    found = cells(quick=False)
    assert len({cell.slug for cell in found}) == len(found)
    by_default = {(c.keep, c.target) for c in found if c.method == "coalesce" and c.steps is None}
    targets = ("original", "blockwise", "sequential")
    assert by_default == {(keep, each) for keep in (0.75, 0.5, 0.25) for each in targets}
    assert FOUND["block_layers"] == BLOCK


def test_a_cell_changes_nothing_of_the_refit_but_what_it_names() -> None:
    plain = RefitConfig(enabled=True, block_layers=BLOCK)
    cell = TargetCell("coalesce", 0.5, True, "sequential")
    found = RefitConfig.model_validate(cell.refit_section)
    assert found == plain.model_copy(update={"target": "sequential"})
    closed = RefitConfig.model_validate(TargetCell("reap", 0.5, True, steps=0).refit_section)
    assert (closed.target, closed.polish.steps) == ("original", 0)


def test_rows_are_means_over_seeds() -> None:
    original = {"perplexity": {"overall": 4.0, "domains": {"a": 4.0}}}
    same = {"method": "coalesce", "keep": 0.5, "steps": None, "target": "blockwise"}
    made = [
        same
        | {"seed": seed, "agreement": 0.5, "cpu_seconds": 10.0 + seed}
        | {"perplexity": {"domains": {"a": after}}, "kl": {"overall": 0.1}}
        for seed, after in enumerate((4.0, 16.0))
    ]
    (row,) = summary(original, made)
    assert row["perplexity"] == pytest.approx(8.0)
    assert row["cpu_seconds"] == 10.5
    assert row["seeds"] == [0, 1]
