"""One budget for fewer and for narrower experts: rise of log-perplexity, the same bytes each time.

The bundled model. Of every layer those experts go that its output misses least, and the others keep
as many neurons as the bytes allow (`group.experts`); every layer is refitted for itself. One
observation, one held-out text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.divide import ROOT
from benchmarks.divide import config as divided
from benchmarks.output import show
from benchmarks.pages import options, show_or_put
from benchmarks.quality import rounded
from benchmarks.quality_summary import fewer
from models.arrow import read_table
from models.atomic import write_json
from orchestrator.load import validate
from orchestrator.preflight import prepare
from orchestrator.run import observe, run
from orchestrator.run_folder import versions

# Share of the neurons that stays -> experts among which they are dealt out evenly, in eights.
EXPERTS = {0.75: (16, 12), 0.5: (16, 12, 8), 0.25: (16, 12, 8, 4)}
SAMPLE = 32_768
# What stands between these lines of a page comes from the file.
MARKS = ("<!-- axes: begin -->\n", "<!-- axes: end -->\n")


def main() -> None:
    """Prints a row per share and number of experts; with --out, goes on where it ended."""
    quick = "half of the neurons, few tokens"
    given = options(__doc__, quick, ROOT / "runs" / "axes").parse_args()
    if given.table:
        show_or_put(table(json.loads(given.table.read_text())["rows"]), given.page, MARKS)
        return
    out = given.out.absolute() / ("quick" if given.quick else "full")
    shapes = {0.5: (16, 12)} if given.quick else EXPERTS
    rows = [
        measured(out, keep, experts, quick=given.quick)
        for keep, each in shapes.items()
        for experts in each
    ]
    figures = {"versions": versions(), "seeds": [0], "rows": rounded(rows)}
    write_json(out / "axes.json", {"benchmark": "one budget, two axes"} | figures)
    show("axes", rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per share and number of experts."""
    lines = ["| fewer expert bytes | experts x neurons | predicted error | rise |"]
    lines.append("|---|---|---:|---:|")
    for row in rows:
        shape = f"{row['experts']} x {row['width']}"
        lines.append(
            f"| {fewer(row['keep'])} | {shape} | {row['predicted']:.3f} | {row['rise']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def measured(out: Path, keep: float, experts: int, *, quick: bool) -> dict[str, Any]:
    """One run; what was observed is used again."""
    seen = out / "observed"
    if not (seen / "statistics.arrow.json").exists():
        observe(prepare(validate(config(seen, quick=quick))))
    values = config(out / f"{keep}-{experts}", quick=quick)
    values["calibrate"]["statistics"] = str(seen / "statistics.arrow")
    values["group"] = {"method": "coalesce", "experts": experts, "budget": {"keep_ratio": keep}}
    if quick:
        values["refit"]["polish"] = {"steps": 0}
    job = prepare(validate(values))
    if not (job.folder.report / "report.json").exists():
        run(job)
    report = json.loads((job.folder.report / "report.json").read_text())
    perplexity = report["perplexity"]
    decided = read_table(job.folder.root / "decision.arrow").to_pylist()
    layers = {row["layer"] for row in decided}
    return {
        "keep": keep,
        "experts": experts,
        "width": decided[0]["width"],
        "predicted": mean(
            sum(row["predicted_error"] for row in decided if row["layer"] == layer)
            for layer in sorted(layers)
        ),
        "rise": math.log(perplexity["compressed"]["overall"] / perplexity["original"]["overall"]),
        "kl": report["kl"]["compressed"]["overall"],
        "bytes": report["bytes"]["after"],
    }


def config(folder: Path, *, quick: bool) -> dict[str, Any]:
    """As where a budget is divided between layers, with the sample of the comparison of methods."""
    values = divided(folder, 0, quick=quick)
    if not quick:
        values["calibrate"]["sample"]["tokens"] = SAMPLE
    return values | {"refit": {"preset": "parallel"}}


if __name__ == "__main__":
    main()
