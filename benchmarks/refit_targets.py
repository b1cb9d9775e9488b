"""What a layer is fitted to: `refit.target`, measured as the quality benchmark measures methods.

The default method at each ratio, fitted to its own outputs, block by block, and layer after layer.
Results are kept in --out, one file per reduced model: the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.output import show
from benchmarks.pages import show_or_put
from benchmarks.quality import BUNDLED, RATIOS, all_work
from benchmarks.quality import Task as QualityTask
from benchmarks.quality_cell import Setup
from benchmarks.quality_methods import Cell
from benchmarks.quality_summary import fewer, rises, standard_error
from models.atomic import write_json
from orchestrator.run_folder import versions

# What stands between these lines of a page comes from the file.
MARKS = ("<!-- refit targets: begin -->\n", "<!-- refit targets: end -->\n")
BLOCK = 2


@dataclass(frozen=True)
class TargetCell(Cell):
    """A cell with another target of its refit."""

    target: str = "original"
    steps: int | None = None  # of the polish; None: the default

    @property
    def slug(self) -> str:
        """A file name."""
        polish = "" if self.steps is None else f"-polish-{self.steps}"
        return f"{super().slug}-{self.target}{polish}"

    @property
    def refit_section(self) -> dict[str, Any]:
        """The refit section of a run's config."""
        polish = {} if self.steps is None else {"polish": {"steps": self.steps}}
        return {"enabled": True, "target": self.target, "block_layers": BLOCK} | polish


def cells(quick: bool) -> tuple[TargetCell, ...]:
    """The default method at every ratio; the closed form alone at one."""
    targets = ("original", "blockwise", "sequential")
    if quick:
        return tuple(TargetCell("coalesce", 0.5, True, each, 5) for each in targets)
    found = [TargetCell("coalesce", keep, True, each) for keep in RATIOS for each in targets]
    found += [TargetCell("coalesce", 0.5, True, each, 0) for each in targets]
    return tuple(found + [TargetCell("reap", 0.5, True, each) for each in targets])


def summary(original: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method, ratio, steps and target: means over seeds."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in found:
        key = tuple(cell[name] for name in ("method", "keep", "steps", "target"))
        grouped.setdefault(key, []).append(cell)
    return [_row(original, each) for each in grouped.values()]


def _row(original: dict[str, Any], each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = each[0]
    by_seed = [mean(rises(original, cell).values()) for cell in each]
    names = ("method", "keep", "steps", "target")
    spent = [cell["cpu_seconds"] for cell in each if "cpu_seconds" in cell]
    return {name: first[name] for name in names} | {
        "seeds": [cell["seed"] for cell in each],
        "perplexity": original["perplexity"]["overall"] * math.exp(mean(by_seed)),
        "rise": mean(by_seed),
        "se_seeds": standard_error(by_seed),
        "kl": mean(cell["kl"]["overall"] for cell in each),
        "agreement": mean(cell["agreement"] for cell in each),
        "cpu_seconds": mean(spent) if spent else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| reduced | target | rise | KL | agreement | CPU seconds to build |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        steps = "" if row["steps"] is None else f", polish.steps={row['steps']}"
        error = "" if row["se_seeds"] is None else f" ± {row['se_seeds']:.3f}"
        words = [f"`{row['method']}`, {fewer(row['keep'])} fewer{steps}", f"`{row['target']}`"]
        words += [f"{row['rise']:.3f}{error}", f"{row['kl']:.3f}"]
        spent = row["cpu_seconds"]
        words += [f"{100 * row['agreement']:.0f} %", "" if spent is None else f"{spent:.0f}"]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, one ratio, five steps")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="one thread each")
    parser.add_argument("--out", help="where results are kept and refit_targets.json is written")
    parser.add_argument("--table", type=Path, help="print the table of such a file, run nothing")
    parser.add_argument("--page", type=Path, help="with --table: write it between a page's marks")
    return parser.parse_args()


def _measure(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    setup = Setup(
        model=(BUNDLED / "model").absolute(),
        calibration=(BUNDLED / "data" / "calibration.parquet").absolute(),
        reported=(BUNDLED / "data" / "test.parquet").absolute(),
        statistics=False,
        **(
            {"tokens": 10_240, "sample": 2048, "evaluated": 5120, "positions": 64, "prompts": 1}
            if options.quick
            else {"sample": 32_768}
        ),
    )
    chosen, seeds = cells(options.quick), range(1 if options.quick else options.seeds)
    tasks = [QualityTask(setup, seed, out / f"seed-{seed}", chosen) for seed in seeds]
    results = all_work(tasks, options.processes)
    found = [cell for each in results for cell in each["cells"]]
    return {
        "benchmark": "targets of the refit",
        "setup": setup.settings(),
        "block_layers": BLOCK,
        "versions": versions(),
        "seeds": list(seeds),
        "rows": summary(results[0]["original"], found),
    }


def main() -> None:
    """Prints all rows; the last line is JSON. With --table: the table of a file, nothing is run."""
    options = options_of()
    if options.table:
        rows = json.loads(options.table.read_text())["rows"]
        show_or_put(table(rows), options.page, MARKS)
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(options.out or scratch).absolute()
        found = _measure(options, out)
        write_json(out / "refit_targets.json", found)
    show("targets of the refit", found["rows"], seeds=found["seeds"])


if __name__ == "__main__":
    main()
