"""Cells to tables: means over seeds, and their standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from benchmarks.paper.cells import ABLATIONS, DISTILLATION, RECOVERED, ROWS, THRESHOLD, Cell
from benchmarks.paper.text import TASKS

MARKS = ("<!-- paper: begin -->\n", "<!-- paper: end -->\n")
Found = dict[str, Any]


def of(found: Found, model: str, cell: Cell) -> list[Found]:
    """The cell in every seed."""
    wanted = asdict(cell)
    return [e for e in found["cells"] if e["model"] == model and e["cell"] == wanted]


def rises(found: Found, model: str, cell: Cell) -> list[float]:
    """Per seed: rise of the mean log-perplexity over the original's on the same text."""
    full = {each["seed"]: each["loss"] for each in of(found, model, ROWS["full"])}
    return [each["loss"] - full[each["seed"]] for each in of(found, model, cell)]


def tables(found: Found) -> str:
    """All tables, per model."""
    parts = []
    for model in dict.fromkeys(each["model"] for each in found["cells"]):
        parts += [f"### {model}\n", _rows(found, model), _domains(found, model)]
        parts += [_rises(found, model, "one property of M-SMoE changed, not trained", ABLATIONS)]
        parts += [_rises(found, model, "S of MC-SMoE, not trained", THRESHOLD)]
        parts += [_rises(found, model, "M-SMoE trained on", DISTILLATION)]
    return "\n".join(parts)


def _rows(found: Found, model: str) -> str:
    """Size, FLOPs, quality with and without recovery."""
    full = of(found, model, ROWS["full"])[0]
    columns = ["parameters", "FLOPs per token", "rise", *TASKS, "rise, recovered"]
    lines = _head("", [*columns, *(f"{task}, recovered" for task in TASKS)])
    for name, cell in ROWS.items():
        each = of(found, model, cell)
        values = [f"{each[0]['parameters'] / 1e6:.2f} M"]
        values.append(f"{each[0]['flops_per_token'] / full['flops_per_token']:.1%}")
        values += _quality(found, model, cell)
        after = RECOVERED.get(name)
        values += [""] * (1 + len(TASKS)) if after is None else _quality(found, model, after)
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _quality(found: Found, model: str, cell: Cell) -> list[str]:
    """Rise and the share of right answers per task."""
    each = of(found, model, cell)
    shares = [spread([one["tasks"][task] for one in each], "{:.1%}") for task in TASKS]
    return [spread(rises(found, model, cell), "{:.3f}"), *shares]


def _domains(found: Found, model: str) -> str:
    """Perplexity per domain."""
    domains = sorted(of(found, model, ROWS["full"])[0]["perplexity"])
    lines = _head("perplexity", domains)
    named = ROWS | {f"{name}, recovered": cell for name, cell in RECOVERED.items()}
    for name, cell in named.items():
        each = of(found, model, cell)
        values = [_geometric([one["perplexity"][domain] for one in each]) for domain in domains]
        lines.append(f"| {name} | " + " | ".join(f"{value:,.1f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _rises(found: Found, model: str, title: str, cells: Mapping[str, Cell]) -> str:
    """Rise, and its difference from the first cell in the same seeds."""
    first = rises(found, model, next(iter(cells.values())))
    lines = _head(title, ["rise", "against the first"])
    for name, cell in cells.items():
        ours = rises(found, model, cell)
        differences = [a - b for a, b in zip(ours, first, strict=True)]
        values = f"{spread(ours, '{:.3f}')} | {spread(differences, '{:+.3f}')}"
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation over seeds; of one seed, its value."""
    text = form.format(mean(values))
    size = form.replace("+", "")
    return text if len(values) < 2 else f"{text} ± {size.format(stdev(values))}"


def _geometric(values: list[float]) -> float:
    return math.exp(mean(map(math.log, values)))


def _head(first: str, columns: list[str]) -> list[str]:
    return [
        f"| {first} | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
