"""From measured cells to rows: means over seeds and domains, and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.quality_methods import METHODS

Row = dict[str, Any]
DEFAULT = "coalesce"
PARALLEL = "coalesce parallel"
OURS = (DEFAULT, "coalesce divided", PARALLEL, "coalesce less text")


def rises(original: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, float]:
    """Domain -> rise of the log-perplexity, nats per token."""
    before, after = (each["perplexity"]["domains"] for each in (original, cell))
    return {domain: math.log(after[domain] / before[domain]) for domain in before}


def summary(original: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per method, ratio and refit, in the order in which they first appear.

    Args:
        original: what was measured of the original; the text is the same for all seeds.
        cells: of all seeds.
    """
    grouped: dict[tuple[str, float, bool], list[Mapping[str, Any]]] = {}
    for cell in cells:
        grouped.setdefault((cell["method"], cell["keep"], cell["refit"]), []).append(cell)
    return [_row(original, each) for each in grouped.values()]


def best_other(rows: Sequence[Row], keep: float) -> Row | None:
    """The published method that loses least without our refit; None: there is none."""
    found = [r for r in rows if r["published"] and not r["refit"] and r["keep"] == keep]
    return min(found, key=lambda row: row["rise"], default=None)


def over_best_other(rows: Sequence[Row], method: str) -> dict[str, float]:
    """Share of the expert bytes that goes -> rise of our method over that of the best other."""
    found = {}
    for row in rows:
        other = best_other(rows, row["keep"])
        if row["method"] == method and row["refit"] and other is not None:
            found[fewer(row["keep"])] = row["rise"] / other["rise"]
    return found


def fewer(keep: float) -> str:
    """`25 %` fewer expert bytes for 0.75."""
    return f"{100 * (1 - keep):.0f} %"


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _row(original: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Row:
    first, by_seed = cells[0], [rises(original, cell) for cell in cells]
    domains = {domain: mean(each[domain] for each in by_seed) for domain in by_seed[0]}
    rise = mean(domains.values())
    recipe = METHODS[first["method"]]
    spent = [cell["cpu_seconds"] for cell in cells if "cpu_seconds" in cell]
    return {
        "method": first["method"],
        "keep": first["keep"],
        "refit": first["refit"],
        "format": first["format"],
        "published": recipe.published,
        "control": recipe.control,
        "seeds": [cell["seed"] for cell in cells],
        "perplexity": original["perplexity"]["overall"] * math.exp(rise),
        "rise": rise,
        "se_seeds": standard_error([mean(each.values()) for each in by_seed]),
        "se_domains": standard_error(list(domains.values())),
        "kl": mean(cell["kl"]["overall"] for cell in cells),
        "agreement": mean(cell["agreement"] for cell in cells),
        # Layers whose refit generalised, and was made, per seed.
        "refitted_layers": [cell["refitted_layers"] for cell in cells],
        "expert_bytes": first["expert_bytes"],
        "bytes": first["bytes"],
        "flops_per_token": first["flops_per_token"],
        # Of building it in one process with one thread; null: not counted.
        "cpu_seconds": mean(spent) if spent else None,
        "domains": domains,
    }
