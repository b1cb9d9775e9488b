"""The benchmark of alignment and router rows: the docs show what it wrote, and say no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.merging import ALIGNMENT, MARKS, METHODS, ROUTERS, recipe, tables
from benchmarks.pages import between
from orchestrator.load import validate

REPOSITORY = Path(__file__).resolve().parents[2]
FOUND: dict[str, Any] = json.loads((REPOSITORY / "docs/results/merging.json").read_text())
RISE = {(row["method"], row["option"]): row["rise"] for row in FOUND["rows"]}


def test_the_docs_hold_exactly_the_table_of_the_file() -> None:
    page = (REPOSITORY / "docs" / "methods.md").read_text()
    assert between(page, MARKS, tables(FOUND)) == page
    assert set(RISE) == {(m, option) for m in METHODS for option in ALIGNMENT | ROUTERS}


@pytest.mark.parametrize("method", METHODS)
def test_the_file_bears_out_what_the_page_says(method: str) -> None:
    of = {option: RISE[method, option] for option in ALIGNMENT | ROUTERS}
    criteria = [of[f"by {each}"] for each in ("weights", "activations", "both")]
    assert max(criteria) - min(criteria) < 0.1 < of["no alignment"] - max(criteria)
    lost = of["router representative"] - of["by weights"]
    rows = ("mean", "least_squares")
    kept = {each: 1 - (of[f"router {each}"] - of["by weights"]) / lost for each in rows}
    assert 0.35 < kept["mean"] < 0.65 < kept["least_squares"]
    assert of["router reinit"] == max(of.values())


@pytest.mark.parametrize("option", ALIGNMENT | ROUTERS)
def test_every_option_is_a_config(tmp_path: Path, option: str) -> None:
    base = recipe(tmp_path / "data", tmp_path, 100, 100)

    config = validate(base | {"group": {"method": "mc_smoe"}} | (ALIGNMENT | ROUTERS)[option])

    assert config.align.enabled == (option != "no alignment")
