"""docs/recover.md says of memory what its file of results holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages import between
from benchmarks.recover_memory import CASES, MARKS, page_text

REPOSITORY = Path(__file__).resolve().parents[2]
FOUND: dict[str, Any] = json.loads((REPOSITORY / "docs/results/recover_memory.json").read_text())
PEAK = {(row["version"], row["case"]): row["peak_bytes"] for row in FOUND["rows"]}


def test_the_page_holds_exactly_what_the_file_says() -> None:
    page = (REPOSITORY / "docs" / "recover.md").read_text()
    assert between(page, MARKS, page_text(FOUND)) == page


def test_every_case_needs_less_than_before_and_stage_3_least_in_fp32() -> None:
    before = [case for case in CASES if ("before", case) in PEAK]
    assert len(before) == 3
    assert all(PEAK["now", case] < PEAK["before", case] for case in before)
    assert PEAK["now", "ZeRO 3, fp32"] < 0.5 * PEAK["before", "ZeRO 3, fp32"]
    kept = PEAK["now", "ZeRO 3, no layer passing twice"]
    assert PEAK["now", "ZeRO 3, fp32"] < kept - 0.5 * FOUND["checkpoint_bytes"]
    assert PEAK["now", "ZeRO 3, fp32"] < PEAK["now", "ZeRO 1, fp32"]
