"""What dividing one budget between layers brings: rise of log-perplexity, the same bytes each time.

The bundled model, narrowed by `coalesce` with one width for all layers, with widths by measured
damage, and with widths by predicted errors. One observation per seed, the same held-out text.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.output import show
from benchmarks.pages import options, show_or_put
from benchmarks.quality import rounded
from models.atomic import write_json
from orchestrator import run_folder
from orchestrator.load import validate
from orchestrator.preflight import prepare
from orchestrator.run import observe, run
from orchestrator.run_folder import RunFolder, versions

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "examples" / "bundled"
WAYS = ("uniform", "probe", "predicted")
# What stands between these lines of a page comes from the file.
MARKS = ("<!-- divide: begin -->\n", "<!-- divide: end -->\n")


def main() -> None:
    """Prints a row per (seed, share of neurons, way); with --out, goes on where it ended."""
    quick = "one seed, half, few tokens, no polish"
    parser = options(__doc__, quick, ROOT / "runs" / "divide")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    if given.table:
        show_or_put(table(json.loads(given.table.read_text())["rows"]), given.page, MARKS)
        return
    out = given.out.absolute() / ("quick" if given.quick else "full")
    seeds, keeps = (1, (0.5,)) if given.quick else (given.seeds, (0.5, 0.25))
    rows = [
        measured(out, seed, keep, way, quick=given.quick)
        for seed in range(seeds)
        for keep in keeps
        for way in WAYS
    ]
    figures = {"versions": versions(), "seeds": list(range(seeds)), "rows": rounded(rows)}
    write_json(out / "divide.json", {"benchmark": "one budget, divided"} | figures)
    show("divide", rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: rise per way, all seeds, and the widths of the first one."""
    lines = ["| share of the neurons | " + " | ".join(f"`{way}`" for way in WAYS) + " |"]
    lines.append("|---|" + "---:|" * len(WAYS))
    for keep in dict.fromkeys(row["keep"] for row in rows):
        cells = []
        for way in WAYS:
            each = [row for row in rows if (row["keep"], row["way"]) == (keep, way)]
            rises = ", ".join(f"{row['rise']:.3f}" for row in each)
            widths = each[0]["widths"] if each else ""
            cells.append(rises if way == "uniform" else f"{rises} ({widths})")
        lines.append(f"| {100 * keep:.0f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measured(out: Path, seed: int, keep: float, way: str, *, quick: bool) -> dict[str, Any]:
    """One run; what was observed and probed for the seed is used again."""
    seen = out / f"seed-{seed}"
    if not (seen / "statistics.arrow.json").exists():
        observe(prepare(validate(config(seen, seed, quick=quick))))
    values = config(out / f"seed-{seed}-{way}-{keep}", seed, quick=quick)
    values["calibrate"]["statistics"] = str(seen / "statistics.arrow")
    values["group"] = {"method": "coalesce", "divide": way, "budget": {"keep_ratio": keep}}
    values["export"] = {"format": "mapped"}
    if quick:
        values["refit"] = {"polish": {"steps": 0}}
        values["probe"] = {"ratios": [0.25, 0.5, 0.75], "tokens": 2048, "positions": 512}
    job = prepare(validate(values))
    probed = RunFolder(seen).probe
    if way == "probe" and probed.exists() and not job.folder.probe.exists():
        run_folder.claim(job.folder, job.config, job.model)
        shutil.copytree(probed, job.folder.probe)
    if not (job.folder.report / "report.json").exists():
        run(job)
    if way == "probe" and not probed.exists():
        shutil.copytree(job.folder.probe, probed)
    report = json.loads((job.folder.report / "report.json").read_text())
    perplexity = report["perplexity"]
    rise = math.log(perplexity["compressed"]["overall"] / perplexity["original"]["overall"])
    return {
        "seed": seed,
        "keep": keep,
        "way": way,
        "rise": rise,
        "kl": report["kl"]["compressed"]["overall"],
        "bytes": report["bytes"]["after"],
        "widths": " ".join(str(width) for width in report["width"]["layers"].values()),
    }


def config(folder: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """A run's config; everything that is not named has its default."""

    def data(name: str, tokens: int, seed: int) -> dict[str, Any]:
        source = {"path": str(BUNDLED / "data" / f"{name}.parquet"), "domain_column": "domain"}
        return {"sources": [source], "tokens": tokens, "sequence_length": 256, "seed": seed}

    observed, sample, held = (10_240, 1024, 2560) if quick else (81_920, 4096, 10_240)
    common = {"batch_size": 16, "dtype": "float32"}
    return {
        "run_dir": str(folder),
        "model": {"path": str(BUNDLED / "model"), "verify": "headers"},
        "calibrate": common
        | {
            "data": data("calibration", observed, seed),
            "shards": 2,
            "sample": {"tokens": sample, "seed": seed},
        },
        "evaluate": common | {"data": data("test", held, 0), "baselines": [], "kl_positions": 512},
        "executor": {"kind": "local"},
    }


if __name__ == "__main__":
    main()
