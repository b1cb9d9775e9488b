"""Fewer or narrower experts at equal bytes: the page shows what the file holds."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.axes import EXPERTS, MARKS, table
from benchmarks.pages import between

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_holds_exactly_the_table_of_the_file() -> None:
    rows = json.loads((DOCS / "results" / "axes.json").read_text())["rows"]
    page = (DOCS / "reduction.md").read_text()
    assert between(page, MARKS, table(rows)) == page
    shapes = [(row["keep"], row["experts"]) for row in rows]
    assert shapes == [(keep, count) for keep, each in EXPERTS.items() for count in each]


def test_all_shapes_of_a_budget_have_as_many_neurons() -> None:
    rows = json.loads((DOCS / "results" / "axes.json").read_text())["rows"]
    for keep in EXPERTS:
        neurons = {row["experts"] * row["width"] for row in rows if row["keep"] == keep}
        assert neurons == {round(keep * 16 * 96)}
