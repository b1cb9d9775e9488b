"""docs/faults.md names the test of every fault; such a test must be there, and run somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = (TESTS.parent / "docs" / "faults.md").read_text()


def named() -> Iterator[tuple[str, str]]:
    """File and test; `::name` alone is in the file named before it, and a file may stand alone."""
    file = ""
    for found in re.finditer(r"`([\w/]+\.py)?(?:::(test_\w+))?`", PAGE):
        file = found[1] or file
        if found[0] != "``":
            yield file, found[2] or ""


@pytest.mark.parametrize(("file", "name"), named())
def test_the_test_that_the_page_names_is_there(file: str, name: str) -> None:
    text = (TESTS / file).read_text()
    assert f"def {name}(" in text if name else "def test_" in text


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    faults = [row for row in rows if not row.startswith("| fault |")]
    shown = [row.split("|")[3] for row in faults]
    assert len(faults) > 20
    assert [row for row, by in zip(faults, shown, strict=True) if "`" not in by] == [
        row for row, by in zip(faults, shown, strict=True) if by.strip() == "the same"
    ]
