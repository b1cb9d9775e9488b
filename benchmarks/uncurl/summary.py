"""Cells of several seeds to rows, and the largest factor by which a model may be reduced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.uncurl.cells import TWO_STAGE, Cell
from benchmarks.uncurl.recipes import SCRATCH

Row = Mapping[str, Any]
# Seed -> number.
Values = Mapping[str, float]
# What may be lost against a model that was trained with so few experts, in nats.
MARGINS = (0.0, 0.02, 0.05)


def rows_of(found: Iterable[tuple[Cell, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row per cell but for its seed; `losses[mark][task]` has a value by seed (as text)."""
    rows: dict[str, dict[str, Any]] = {}
    for cell, made in found:
        key = cell.slug.split("-", 1)[1]
        words = {name: getattr(cell, name) for name in Cell.__dataclass_fields__ if name != "seed"}
        row = rows.setdefault(key, words | {"seeds": [], "losses": {}})
        row["seeds"].append(cell.seed)
        for mark, losses in made["losses"].items():
            for task, loss in losses.items():
                values = row["losses"].setdefault(mark, {}).setdefault(task, {})
                values[str(cell.seed)] = round(loss, 5)
    return list(rows.values())


def chosen(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose fields are these."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def mean(values: Values) -> float:
    """Over seeds."""
    return sum(values.values()) / len(values)


def differences(values: Values, base: Values) -> dict[str, float]:
    """Seed by seed, of those that both have: the spread of the models is not in them."""
    return {seed: value - base[seed] for seed, value in values.items() if seed in base}


def spread(values: Values) -> float | None:
    """Standard error of the mean; None from one seed."""
    if len(values) < 2:
        return None
    centre = mean(values)
    variance = sum((value - centre) ** 2 for value in values.values()) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def safe_factors(rows: Sequence[Row], task: str) -> list[dict[str, Any]]:
    """For every tuned recipe and size: by how much the experts may be reduced, per margin.

    A factor is safe if the mean loss after tuning is at most that of the model trained with as few
    experts, tuned alike, plus the margin, and all smaller factors are safe; 1: none is.
    """
    tuned = chosen(rows, tuning=TWO_STAGE, task=task)
    scratch = {
        row["experts"]: row["losses"]["tuned"][task] for row in chosen(tuned, recipe=SCRATCH)
    }
    made = []
    for recipe in dict.fromkeys(row["recipe"] for row in tuned if row["recipe"] != SCRATCH):
        for experts in sorted({row["experts"] for row in chosen(tuned, recipe=recipe)}):
            gaps = {}
            for row in chosen(tuned, recipe=recipe, experts=experts):
                apart = differences(row["losses"]["tuned"][task], scratch.get(row["kept"], {}))
                if apart:
                    gaps[experts // row["kept"]] = mean(apart)
            made.append(
                {
                    "recipe": recipe,
                    "experts": experts,
                    "gaps": {str(factor): round(gap, 4) for factor, gap in sorted(gaps.items())},
                    "safe": {str(margin): largest_safe(gaps, margin) for margin in MARGINS},
                }
            )
    return made


def largest_safe(gaps: Mapping[int, float], margin: float) -> int:
    """The largest factor up to which no gap exceeds the margin; 1: the smallest already does."""
    found = 1
    for factor, gap in sorted(gaps.items()):
        if gap > margin:
            break
        found = factor
    return found


def summarised(
    task: str, found: Iterable[tuple[Cell, Mapping[str, Any]]], planted: Sequence[Row]
) -> dict[str, Any]:
    """What the file of results holds beside setup and versions."""
    rows = rows_of(found)
    return {"rows": rows, "safe_factors": safe_factors(rows, task), "planted": list(planted)}
