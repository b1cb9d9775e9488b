"""The figure of docs/uncurl.md: what reducing costs at once, and what is left after tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.uncurl.cells import PLAIN, TWO_STAGE
from benchmarks.uncurl.recipes import GROUPINGS, SCRATCH
from benchmarks.uncurl.summary import Values, chosen, differences, mean, spread

RECIPES = {"uncurl, paper": "--", "uncurl, remapped": "-"}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG or SVG, by the name's ending."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    task = found["setup"]["tasks"][0]
    _at_once(left, found, task)
    _tuned(right, found, task)
    figure.savefig(path, dpi=110)


def _at_once(axes: Axes, found: Mapping[str, Any], task: str) -> None:
    """The largest model: rise without training against the factor."""
    plain = chosen(found["rows"], tuning=PLAIN, task=task)
    experts = max(row["experts"] for row in plain)
    (base,) = chosen(found["rows"], tuning=PLAIN, recipe=SCRATCH, experts=experts)
    for recipe in GROUPINGS:
        rows = sorted(chosen(plain, recipe=recipe, experts=experts), key=lambda r: -r["kept"])
        trained = base["losses"]["before"][task]
        rises = [differences(row["losses"]["before"][task], trained) for row in rows]
        factors = [experts // row["kept"] for row in rows]
        errors = [spread(rise) or 0.0 for rise in rises]
        axes.errorbar(factors, [mean(r) for r in rises], errors, marker="o", ms=3, label=recipe)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"factor by which {experts} experts are reduced")
    axes.set_ylabel(f"rise of the cross-entropy on {task}, nats")
    axes.set_title("at once", fontsize=10)
    axes.legend(fontsize=7)


def _tuned(axes: Axes, found: Mapping[str, Any], task: str) -> None:
    """Cross-entropy after tuning against the experts that are left, per size before."""
    tuned = chosen(found["rows"], tuning=TWO_STAGE, task=task)
    scratch = sorted(chosen(tuned, recipe=SCRATCH), key=lambda row: row["experts"])
    _line(axes, [(r["experts"], r["losses"]["tuned"][task]) for r in scratch], "k-", "scratch")
    sizes = sorted({row["experts"] for row in tuned if row["recipe"] != SCRATCH})
    for index, experts in enumerate(sizes):
        for recipe, style in RECIPES.items():
            rows = sorted(
                chosen(tuned, recipe=recipe, experts=experts), key=lambda row: row["kept"]
            )
            points = [(row["kept"], row["losses"]["tuned"][task]) for row in rows]
            _line(axes, points, f"C{index}{style}", f"{recipe}, from {experts}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("experts that are left")
    axes.set_ylabel(f"cross-entropy on {task}, nats")
    axes.set_title("after both stages of tuning", fontsize=10)
    axes.legend(fontsize=7)


def _line(axes: Axes, points: list[tuple[int, Values]], style: str, label: str) -> None:
    if points:
        values = [mean(each) for _, each in points]
        errors = [spread(each) or 0.0 for _, each in points]
        axes.errorbar(
            [x for x, _ in points], values, errors, fmt=style, marker="o", ms=3, label=label
        )
