"""What alignment and the router's rows are worth: merged models that differ in nothing else.

One observation, half of the experts, no refit. Every row is a run of its own that reads the same
statistics and sample, and is measured on text that nothing was chosen on. One seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import show
from benchmarks.pages import show_or_put
from benchmarks.quality import BUNDLED
from models.atomic import write_json
from orchestrator.load import validate
from orchestrator.preflight import prepare
from orchestrator.report.cautions import domain_rises
from orchestrator.run import observe, run
from orchestrator.run_folder import versions

METHODS = ("mc_smoe",)
# Sections of a run: name of the option -> what differs from the defaults.
ALIGNMENT: dict[str, dict[str, Any]] = {
    "no alignment": {"align": {"enabled": False}, "export": {"format": "mapped"}},
    "by weights": {"export": {"format": "mapped"}},
    "by activations": {"align": {"by": "activations"}, "export": {"format": "mapped"}},
    "by both": {"align": {"by": "both"}, "export": {"format": "mapped"}},
}
ROUTERS: dict[str, dict[str, Any]] = {
    f"router {router}": {"export": {"router": router}}
    for router in ("representative", "mean", "least_squares", "reinit")
}
# What stands between these lines of a page comes from the file.
MARKS = ("<!-- merging: begin -->\n", "<!-- merging: end -->\n")


def recipe(data: Path, folder: Path, tokens: int, evaluated: int) -> dict[str, Any]:
    """The config of the observation."""

    def text(name: str, size: int) -> dict[str, Any]:
        source = {"path": str(data / f"{name}.parquet"), "domain_column": "domain"}
        return {"sources": [source], "tokens": size, "sequence_length": 256}

    return {
        "run_dir": str(folder / "observed"),
        "model": {"path": str(data.parent / "model"), "verify": "headers"},
        "calibrate": {
            "data": text("calibration", tokens),
            "dtype": "float32",
            "batch_size": 16,
            "shards": 1,
        },
        "evaluate": {"data": text("test", evaluated), "baselines": [], "dtype": "float32"},
        "executor": {"kind": "local"},
    }


def measured(base: dict[str, Any], method: str, option: dict[str, Any], folder: Path) -> Any:
    """The report of one run."""
    group = {"method": method, "budget": {"keep_ratio": 0.5}}
    changed = base | {"group": group, "run_dir": str(folder)} | option
    return json.loads((run(prepare(validate(changed))) / "report.json").read_text())


def rows(base: dict[str, Any], folder: Path, methods: Sequence[str]) -> list[dict[str, Any]]:
    """One row per method and option."""
    statistics = observe(prepare(validate(base)))
    reuse = base | {"calibrate": base["calibrate"] | {"statistics": str(statistics)}}
    found = []
    for method in methods:
        for name, option in (ALIGNMENT | ROUTERS).items():
            place = folder / f"{method}-{name}".replace(" ", "-")
            report = measured(reuse, method, option, place)
            rises = domain_rises(report["perplexity"])
            found.append(
                {
                    "method": method,
                    "option": name,
                    "format": report["format"],
                    "perplexity": float(f"{report['perplexity']['compressed']['overall']:.5g}"),
                    "rise": round(sum(rises.values()) / len(rises), 4),
                    "kl": round(report["kl"]["compressed"]["overall"], 4),
                }
            )
    return found


def tables(found: dict[str, Any]) -> str:
    """Rise per option, a column per method."""
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    by = {(row["option"], row["method"]): row for row in found["rows"]}
    lines = ["| half of the experts | format | " + " | ".join(f"`{m}`" for m in methods) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(methods))
    for option in dict.fromkeys(row["option"] for row in found["rows"]):
        cells = [f"{by[option, method]['rise']:.3f}" for method in methods]
        form = by[option, methods[0]]["format"]
        lines.append(f"| {option} | {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints all rows; the last line is JSON. With --table: the table of a file, nothing is run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little text")
    parser.add_argument("--out", type=Path, help="where runs are kept and merging.json is written")
    parser.add_argument("--table", type=Path, help="print the table of such a file, run nothing")
    parser.add_argument("--page", type=Path, help="with --table: write it between a page's marks")
    options = parser.parse_args()
    if options.table:
        show_or_put(tables(json.loads(options.table.read_text())), options.page, MARKS)
        return
    torch.set_num_threads(1)
    tokens, evaluated = (8192, 2560) if options.quick else (81_920, 10_240)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.out or Path(scratch)).absolute()
        base = recipe(BUNDLED / "data", folder, tokens, evaluated)
        found = rows(base, folder, METHODS)
        setup = {"tokens": tokens, "evaluated": evaluated, "sample": 4096, "seeds": [0]}
        figures = {"benchmark": "merging", "setup": setup, "versions": versions(), "rows": found}
        write_json(folder / "merging.json", figures)
    show("merging: alignment and router", found)


if __name__ == "__main__":
    main()
