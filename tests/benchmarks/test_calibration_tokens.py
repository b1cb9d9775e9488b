"""The benchmark of calibration text: what it reports, and that the docs show what it wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.calibration_tokens import (
    CELLS,
    MARKS,
    TOKENS,
    collect,
    options_of,
    plan,
    setup_of,
    tables,
)
from benchmarks.pages import between

REPOSITORY = Path(__file__).resolve().parents[2]
FOUND: dict[str, Any] = json.loads((REPOSITORY / "docs/results/calibration.json").read_text())


def test_the_docs_hold_exactly_the_tables_of_the_file() -> None:
    page = (REPOSITORY / "docs" / "calibration.md").read_text()
    assert between(page, MARKS, tables(FOUND)) == page


def test_the_file_holds_every_size_and_one_domain_with_every_cell() -> None:
    groups = [*FOUND["calibration_tokens"], FOUND["one_domain"]]
    cells = {(cell.method, cell.keep, cell.refit) for cell in CELLS}
    assert [group["tokens"] for group in FOUND["calibration_tokens"]] == list(TOKENS)
    assert FOUND["one_domain"]["tokens"] in TOKENS
    for group in groups:
        assert {(row["method"], row["keep"], row["refit"]) for row in group["rows"]} == cells
        assert all(row["seeds"] == FOUND["seeds"] for row in group["rows"])


def test_calibration_on_one_domain_costs_every_other_domain_more() -> None:
    """The finding of the page, from its file: the default, whose refit reads the sample."""
    one = FOUND["one_domain"]
    mixed = next(g for g in FOUND["calibration_tokens"] if g["tokens"] == one["tokens"])
    alone, beside = (
        next(row for row in group["rows"] if row["refit"])["domains"] for group in (one, mixed)
    )
    assert all(alone[d] > beside[d] for d in alone if d != one["domain"])
    assert alone[one["domain"]] < beside[one["domain"]]


def test_every_calibration_token_is_sampled_and_one_domain_has_a_size_beside_it(
    tmp_path: Path,
) -> None:
    setup = setup_of(options_of([]))

    tasks = plan(setup, TOKENS, "legal", tmp_path)

    assert [task.setup.tokens for task in tasks] == [*TOKENS, TOKENS[-2]]
    assert all(task.setup.tokens == task.setup.sample for task in tasks)
    assert tasks[-1].setup.calibration.name == "legal.parquet"
    assert len({task.folder for task in tasks}) == len(tasks)


def test_rows_are_told_apart_by_size_and_domain(tmp_path: Path) -> None:
    setup = replace(setup_of(options_of(["--quick"])), tokens=1)
    tasks = plan(setup, (10, 20), "legal", tmp_path)
    original = {"perplexity": {"overall": 2.0, "domains": {"legal": 2.0}}, "continuations": [[1]]}
    cell = {
        **dict.fromkeys(("expert_bytes", "bytes", "flops_per_token", "refitted_layers"), 0),
        "method": "reap",
        "keep": 0.5,
        "refit": False,
        "format": "native",
        "seed": 0,
        "agreement": 0.5,
        "kl": {"overall": 0.1},
        "perplexity": {"domains": {"legal": 4.0}},
    }
    results = [{"original": original, "cells": [cell]} for _ in tasks]

    found = collect(setup, tasks, results, "legal")

    assert [each["tokens"] for each in found["calibration_tokens"]] == [10, 20]
    assert found["one_domain"]["tokens"] == 10
    assert "continuations" not in found["original"]
    assert "| 20 | 0.693 |" in tables(found)
