"""The table of the divided budget: every way and seed at its share, widths of the first seed."""

from __future__ import annotations

from typing import Any

from benchmarks.divide import WAYS, table


def test_the_table_holds_every_seed_of_every_way() -> None:
    rows: list[dict[str, Any]] = [
        {"seed": seed, "keep": keep, "way": way, "rise": keep + seed / 10, "widths": f"{seed} 8"}
        for seed in (0, 1)
        for keep in (0.5, 0.25)
        for way in WAYS
    ]

    lines = table(rows).splitlines()

    assert lines[0] == "| share of the neurons | `uniform` | `probe` | `predicted` |"
    assert lines[2] == "| 50 % | 0.500, 0.600 | 0.500, 0.600 (0 8) | 0.500, 0.600 (0 8) |"
    assert lines[3].startswith("| 25 % | 0.250, 0.350 |") and len(lines) == 4
