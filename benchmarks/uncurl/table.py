"""The tables of docs/uncurl.md, from the file that the benchmark wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.uncurl.cells import PLAIN, ROUTER_ONLY, TWO_STAGE
from benchmarks.uncurl.recipes import EVERYTHING, GROUPINGS, ROUTERS, SCRATCH, TUNED
from benchmarks.uncurl.summary import Row, Values, chosen, differences, mean, spread

# What stands between these lines of a page comes from the file.
MARKS = ("<!-- uncurl: begin -->\n", "<!-- uncurl: end -->\n")


def tables(found: Mapping[str, Any]) -> str:
    """All tables in Markdown, each with a title."""
    tasks, rows = found["setup"]["tasks"], found["rows"]
    parts = [
        ("As trained: held-out cross-entropy, nats per token", trained_table(found["trained"])),
        (
            f"At once, task `{tasks[0]}`: rise of the cross-entropy, nats per token",
            curve(rows, tasks[0]),
        ),
        (
            "After both stages of tuning: above a model trained with so few",
            tuned_table(rows, tasks[0]),
        ),
        ("Largest safe factor", safe_table(found["safe_factors"])),
        ("Statistics of one task or another", tasks_table(rows, tasks)),
        ("Routers, trained alone", routers_table(rows, tasks[0])),
        ("Copies that have to be found", planted_table(found["planted"])),
    ]
    return "\n\n".join(f"**{title}**\n\n{body}" for title, body in parts if body) + "\n"


def trained_table(trained: Sequence[Row]) -> str:
    """Mean over the domains per size and seed."""
    sizes = sorted({row["experts"] for row in trained})
    lines = []
    for seed in sorted({row["seed"] for row in trained}):
        line = [f"seed {seed}"]
        for size in sizes:
            found = [row for row in trained if (row["seed"], row["experts"]) == (seed, size)]
            line.append(f"{mean(found[0]['held_out_loss']):.3f}" if found else "")
        lines.append(line)
    return markdown(["", *(f"{size} experts" for size in sizes)], lines)


def curve(rows: Sequence[Row], task: str) -> str:
    """Rise over the model as trained, per size before and after."""
    of_task = chosen(rows, tuning=PLAIN, task=task)
    sizes = dict.fromkeys((row["experts"], row["kept"]) for row in of_task)
    base = {
        row["experts"]: row["losses"]["before"][task]
        for row in chosen(rows, tuning=PLAIN, recipe=SCRATCH)
    }
    lines = []
    for recipe in GROUPINGS:
        line = [recipe]
        for experts, kept in sizes:
            cell = chosen(of_task, recipe=recipe, experts=experts, kept=kept)
            line.append(_rise(cell[0]["losses"]["before"][task], base[experts]) if cell else "")
        lines.append(line)
    return markdown(["", *(f"{experts} to {kept}" for experts, kept in sizes)], lines)


def tuned_table(rows: Sequence[Row], task: str) -> str:
    """Cross-entropy after tuning, less that of the model trained with as few experts."""
    tuned = chosen(rows, tuning=TWO_STAGE, task=task)
    scratch = {
        row["experts"]: row["losses"]["tuned"][task] for row in chosen(tuned, recipe=SCRATCH)
    }
    sizes = dict.fromkeys(
        (row["experts"], row["kept"]) for row in tuned if row["recipe"] != SCRATCH
    )
    lines = [
        [
            "trained with so few: cross-entropy",
            *(plus_minus(scratch.get(kept, {})) for _, kept in sizes),
        ]
    ]
    for recipe in TUNED:
        line = [recipe]
        for experts, kept in sizes:
            cell = chosen(tuned, recipe=recipe, experts=experts, kept=kept)
            values = cell[0]["losses"]["tuned"][task] if cell else None
            line.append(_rise(values, scratch.get(kept, {}), signed=True) if values else "")
        lines.append(line)
    return markdown(["", *(f"{experts} to {kept}" for experts, kept in sizes)], lines)


def safe_table(factors: Sequence[Row]) -> str:
    """Per margin and number of experts before."""
    if not factors:
        return ""
    sizes = sorted({row["experts"] for row in factors})
    margins = list(factors[0]["safe"])
    head = ["", *(f"{size} experts, + {margin}" for margin in margins for size in sizes)]
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in factors):
        line = [recipe]
        for margin in margins:
            for size in sizes:
                cell = chosen(factors, recipe=recipe, experts=size)
                line.append(str(cell[0]["safe"][margin]) if cell else "")
        lines.append(line)
    return markdown(head, lines)


def tasks_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Loss on each task by statistics of each."""
    plain = chosen(rows, tuning=PLAIN)
    focus = [row for row in plain if row["task"] == EVERYTHING and row["recipe"] != SCRATCH]
    if not focus:
        return ""
    size = {"experts": focus[0]["experts"], "kept": focus[0]["kept"]}
    statistics = (*tasks, EVERYTHING)
    head = [f"{size['experts']} to {size['kept']}"]
    head += [f"on `{task}`, of {_named(of)}" for task in tasks for of in statistics]
    lines = []
    for recipe in GROUPINGS:
        line = [recipe]
        for task in tasks:
            for of in statistics:
                cell = chosen(plain, recipe=recipe, task=of, **size)
                line.append(plus_minus(cell[0]["losses"]["before"][task]) if cell else "")
        lines.append(line)
    return markdown(head, lines)


def routers_table(rows: Sequence[Row], task: str) -> str:
    """Loss after steps on routers alone."""
    found = {row["recipe"]: row for row in chosen(rows, tuning=ROUTER_ONLY, task=task)}
    if not found:
        return ""
    # JSON has sorted them as text.
    marks = sorted(next(iter(found.values()))["losses"], key=int)
    lines = [
        [name, *(plus_minus(found[name]["losses"][mark][task]) for mark in marks)]
        for name in ROUTERS
        if name in found
    ]
    return markdown(["router", *(f"{mark} steps" for mark in marks)], lines)


def planted_table(planted: Sequence[Row]) -> str:
    """Every seed's largest deviation from the model that was copied, and the agreement."""
    lines = []
    for row in planted:
        original = row["original"]["losses"]
        for name in ("copied", *GROUPINGS):
            losses = row[name]["losses"]
            apart = max(abs(losses[task] - original[task]) for task in original)
            found = row[name].get("adjusted_rand")
            agreement = f"{min(found):.3f}" if found else ""
            lines.append([f"seed {row['seed']}", name, f"{apart:.1e}", agreement])
    head = ["", "", "largest change of the cross-entropy", "least adjusted Rand index of a layer"]
    return markdown(head, lines) if lines else ""


def plus_minus(values: Values, signed: bool = False) -> str:
    """Mean and standard error; nothing from nothing."""
    if not values:
        return ""
    error = spread(values)
    text = f"{mean(values):+.3f}" if signed else f"{mean(values):.3f}"
    return text + (f" ± {error:.3f}" if error is not None else "")


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column stands left."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *lines))


def _rise(values: Values, base: Values, signed: bool = False) -> str:
    return plus_minus(differences(values, base), signed)


def _named(statistics: str) -> str:
    return "all text" if statistics == EVERYTHING else f"`{statistics}`"
