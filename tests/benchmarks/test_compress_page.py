"""docs/compress.md shows what its file of results holds, and the file bears out what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compress_page import put

REPOSITORY = Path(__file__).resolve().parents[2]
FOUND: dict[str, Any] = json.loads((REPOSITORY / "docs/results/compress.json").read_text())


def test_the_page_holds_exactly_the_tables_of_the_file() -> None:
    page = (REPOSITORY / "docs" / "compress.md").read_text()
    assert put(page, FOUND) == page


def test_what_does_not_depend_on_the_machine() -> None:
    """Files are the arithmetic and headers; training changes no byte of the sizes."""
    for size in FOUND["speed"].values():
        assert 1 <= size["figures"]["bytes_over_arithmetic"] < 1.01
    switch = FOUND["plans"]["switch-base-32"]
    sizes = [round(switch[name] / 1e6) for name in ("merged", "decomposed")]
    assert sizes == [733, 381]
    small = [row["bytes_over_original"] for row in FOUND["quality"][4:]]
    assert len(small) == 3 and small == pytest.approx([small[0]] * len(small), rel=1e-4)
