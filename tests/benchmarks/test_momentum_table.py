"""The page of the momentum benchmark shows what its file of results says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.momentum import Setup
from benchmarks.momentum_table import MARKS, tables
from benchmarks.pages import between

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs/results/momentum.json"
FOUND: dict[str, Any] = json.loads(RESULTS.read_text())


def test_the_page_holds_exactly_the_tables_of_the_file() -> None:
    page = (REPOSITORY / "docs" / "momentum.md").read_text()
    assert between(page, MARKS, tables(FOUND)) == page


def test_every_cell_of_the_file_is_one_that_the_command_trains() -> None:
    planned = Setup(Path("out")).cells
    names = ("style", "layers", "seed", "variant", "learning_rate")
    known = {tuple(getattr(cell, name) for name in names) for cell in planned}
    found = [tuple(cell[name] for name in names) for cell in FOUND["cells"]]
    assert len(known) == len(planned) == FOUND["planned"]
    assert set(found) <= known and len(set(found)) == len(found)


def test_the_headline_is_the_mean_of_its_cells() -> None:
    for kind, rate in (("clean", "0"), ("attacked", "2.5")):
        for name in ("smoe", "momentum"):
            some = [
                cell["text"]["validation"][rate]["perplexity_per_word"]
                for cell in FOUND["cells"]
                if (cell["style"], cell["layers"], cell["variant"]) == ("post_ln", 6, name)
                and cell["learning_rate"] == FOUND["learning_rate"]
            ]
            assert abs(FOUND[f"{kind}_ppl_{name}"] - sum(some) / len(some)) < 1e-6 * sum(some)
    assert FOUND["mu0_bit_equal"] is True and FOUND["compressed_opens"] is True
