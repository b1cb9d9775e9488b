"""Quality per byte without recovery: every method, with and without refit, beside controls.

One observation per seed serves all methods. Every reduced model is decided, transformed and written
by the product's own stages, opened in plain transformers and measured on text that nothing was
chosen on. All settings of the methods are their defaults. Seeds differ in the calibration text.
Results are kept in --out, one file per reduced model: the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.output import show
from benchmarks.pages import show_or_put
from benchmarks.quality_cell import Setup, measure_cell, observe_seed
from benchmarks.quality_methods import METHODS, QUICK, Cell, cells
from benchmarks.quality_summary import (
    DEFAULT,
    OURS,
    PARALLEL,
    best_other,
    fewer,
    over_best_other,
    summary,
)
from benchmarks.quality_table import marks, tables
from models.atomic import write_json
from orchestrator.errors import ConfigError
from orchestrator.run_folder import versions
from stages.align.config import AlignConfig
from stages.group.config import METHODS as GROUPS
from stages.merge.config import MergeConfig
from stages.narrow.config import NarrowConfig
from stages.refit.config import RefitConfig

BUNDLED = Path(__file__).resolve().parents[1] / "examples" / "bundled"
RATIOS = (0.75, 0.5, 0.25)
# Few methods carry the questions beside the comparison.
ASIDE = (Cell(PARALLEL, 0.5, True), Cell("reap", 0.5, False), Cell("reap", 0.5, True))
TOKENS = (2048, 8192, 32_768)


@dataclass(frozen=True)
class Task:
    """What one process does: one observation and the cells that are made from it."""

    setup: Setup
    seed: int
    folder: Path
    cells: tuple[Cell, ...]


def work(task: Task) -> dict[str, Any]:
    """The original and all cells of one observation; what is in the folder is not repeated."""
    done = held(task)
    if done["original"] is not None and len(done["cells"]) == len(task.cells):
        return done
    observed = observe_seed(task.setup, task.seed, task.folder)
    # What takes longest comes last.
    for cell in sorted(task.cells, key=lambda cell: cell.refit):
        measure_cell(observed, cell)
    found = [measure_cell(observed, cell) for cell in task.cells]
    return {"original": observed.original, "cells": found}


def all_work(tasks: Sequence[Task], processes: int) -> list[dict[str, Any]]:
    """In fresh processes, so that one's memory and threads are not another's."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return list(pool.map(work, tasks))


def held(task: Task) -> dict[str, Any]:
    """What the folder of a task holds so far; what was not measured is left out, or null."""
    names = [task.folder / "cells" / f"{cell.slug}.json" for cell in task.cells]
    found = [json.loads(path.read_text()) for path in names if path.exists()]
    original = task.folder / "original.json"
    known = json.loads(original.read_text()) if original.exists() else None
    return {"original": known, "cells": found}


def setup_of(options: argparse.Namespace) -> Setup:
    """Which model and text; a folder of text has calibration and test files, or folders."""
    model = Path(options.model) if options.model else BUNDLED / "model"
    data = Path(options.data) if options.data else BUNDLED / "data"
    setup = Setup(
        model=model.absolute(),
        calibration=_text(data, ("calibration.parquet", "train")),
        reported=_text(data, (f"{options.split}.parquet", options.split)),
        sample=options.sample,
    )
    if options.quick:
        setup = replace(setup, tokens=10_240, sample=2048, evaluated=5120, positions=64, prompts=1)
    return setup


def _text(data: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (data / name).exists():
            return (data / name).absolute()
    raise ConfigError(f"{data} has neither {' nor '.join(names)}", "name a folder with --data")


def claim(out: Path, setup: Setup) -> None:
    """Results of another model, text, version or default are not mixed with these.

    Raises:
        ConfigError: the folder holds such results.
    """
    sections = (*(each() for each in GROUPS.values()), AlignConfig(), MergeConfig())
    refits = (RefitConfig(preset="parallel"), RefitConfig(preset="thorough"))
    defaults = [each.model_dump(mode="json") for each in (*sections, NarrowConfig(), *refits)]
    wanted = {"setup": setup.settings(), "model": str(setup.model), "defaults": defaults}
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(wanted)):
        raise ConfigError(f"{out} holds results of other settings", "choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def plan(setup: Setup, options: argparse.Namespace, out: Path) -> dict[str, list[Task]]:
    """The comparison, then (unless quick) the number of tokens and calibration on one domain, of
    one seed: differences there are large."""
    chosen = QUICK if options.quick else tuple(options.only or METHODS)
    ratios = (0.5,) if options.quick else RATIOS
    seeds = range(1 if options.quick else options.seeds)
    found = tuple(cells(chosen, ratios))
    few = tuple(each for each in found if not METHODS[each.method].all_tokens)
    part = once(few)
    tasks = {
        "main": [
            Task(setup, seed, out / f"seed-{seed}", few if seed < options.refit_seeds else part)
            for seed in seeds
        ]
    }
    every = [each for each in found if each not in few]
    for key in dict.fromkeys(_observed(each) for each in every):
        some = tuple(each for each in every if _observed(each) == key)
        tokens, statistics = key
        size = setup.tokens if options.quick else tokens or setup.tokens
        whole = replace(setup, tokens=size, sample=size, statistics=statistics)
        whole = replace(whole, statistics_tokens=size) if statistics else whole
        name = "all" if tokens is None else f"all-{tokens}"
        name += "-statistics" if statistics else ""
        some = once(some) if statistics else some
        tasks[name] = [Task(whole, seed, out / f"seed-{seed}-{name}", some) for seed in seeds]
    if options.quick or options.only_comparison:
        return tasks
    for tokens in TOKENS:
        other = replace(setup, tokens=tokens, sample=tokens, statistics=False)
        tasks[f"tokens-{tokens}"] = [Task(other, 0, out / f"tokens-{tokens}", ASIDE)]
    only = options.domain
    text = only_domain(setup.calibration, only, out / f"{only}.parquet")
    one = replace(setup, calibration=text, statistics=False)
    tasks["domain"] = [Task(one, 0, out / "domain", ASIDE)]
    return tasks


def _observed(cell: Cell) -> tuple[int | None, bool]:
    """What is observed for a cell that has no part in the common observation."""
    recipe = METHODS[cell.method]
    return recipe.tokens, recipe.statistics


def once(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Without the refits of other methods than ours, which cost more than all the rest."""
    return tuple(each for each in cells if each.method in OURS or not each.refit)


def only_domain(path: Path, domain: str, target: Path) -> Path:
    """A copy of the text of one domain.

    Raises:
        ConfigError: there is no such domain.
    """
    import pyarrow.compute as pc
    import pyarrow.dataset as pd
    import pyarrow.parquet as pq

    table = pd.dataset(path).to_table(columns=["text", "domain"])
    chosen = table.filter(pc.field("domain") == domain)
    if not len(chosen):
        known = ", ".join(sorted(table["domain"].unique().to_pylist()))
        raise ConfigError(f"no text of domain {domain!r}", f"--domain is one of {known}")
    pq.write_table(chosen, target)
    return target


def collect(
    plans: dict[str, list[Task]], results: dict[str, list[dict[str, Any]]], domain: str
) -> dict[str, Any]:
    """Everything that is reported, from what the processes brought back."""
    original = results["main"][0]["original"]

    def rows(name: str) -> list[dict[str, Any]]:
        return summary(original, [cell for each in results[name] for cell in each["cells"]])

    main = [
        row for name in results if name == "main" or name.startswith("all") for row in rows(name)
    ]
    main.sort(key=lambda row: list(METHODS).index(row["method"]))
    original = {key: value for key, value in original.items() if key != "continuations"}
    best = {fewer(r["keep"]): b["method"] for r in main if (b := best_other(main, r["keep"]))}
    found: dict[str, Any] = {
        "benchmark": "quality without recovery",
        "setup": plans["main"][0].setup.settings(),
        "versions": versions(),
        "seeds": [task.seed for task in plans["main"]],
        "default_over_best_other": over_best_other(main, DEFAULT),
        "over_best_other": {each: over_best_other(main, each) for each in OURS},
        "best_other": best,
        "original": original,
        "rows": main,
    }
    if "all" in plans:
        found["setup_all_tokens"] = plans["all"][0].setup.settings()
    for name in (each for each in plans if each.startswith("all-")):
        found[f"setup_{name}"] = plans[name][0].setup.settings()
    if "domain" in plans:
        found["calibration_tokens"] = [
            {"tokens": tokens, "rows": rows(f"tokens-{tokens}")} for tokens in TOKENS
        ]
        found["one_domain"] = {"domain": domain, "rows": rows("domain")}
    brief: dict[str, Any] = rounded(found)
    return brief


def rounded(value: Any) -> Any:
    """Five significant digits: more would be noise in a file that people compare."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, one ratio, three methods")
    parser.add_argument("--model", help="checkpoint folder; the bundled one by default")
    parser.add_argument("--data", help="folder with calibration.parquet and test.parquet, or train")
    parser.add_argument(
        "--split", default="test", help="what is reported on: a file or folder name"
    )
    parser.add_argument("--domain", default="code_python", help="for calibration on one domain")
    parser.add_argument("--sample", type=int, default=32_768, help="calibrate.sample.tokens")
    parser.add_argument(
        "--only-comparison", action="store_true", help="no tokens, no calibration on one domain"
    )
    parser.add_argument(
        "--only", nargs="+", choices=tuple(METHODS), help="some of the methods, to be measured"
    )
    parser.add_argument("--held", action="store_true", help="report what --out holds, run nothing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--refit-seeds", type=int, default=1, help="of them, those with the refit of every method"
    )
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--out", help="where results are kept and quality.json is written")
    parser.add_argument("--table", type=Path, help="print the tables of such a file, run nothing")
    parser.add_argument("--page", type=Path, help="with --table: write them between a page's marks")
    return parser.parse_args(words)


def main() -> None:
    """Prints all rows; the last line is JSON. With --table: tables of a file, nothing is run."""
    options = options_of()
    if options.table:
        kept = json.loads(options.table.read_text())
        show_or_put(tables(kept), options.page, marks(kept))
        return
    setup = setup_of(options)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(options.out or scratch).absolute()
        claim(out, setup)
        plans = plan(setup, options, out)
        every = [task for tasks in plans.values() for task in tasks]
        flat = (
            [held(task) for task in every] if options.held else all_work(every, options.processes)
        )
        left = iter(flat)
        results = {name: [next(left) for _ in tasks] for name, tasks in plans.items()}
        found = collect(plans, results, options.domain)
        write_json(out / "quality.json", found)
    shown = ("method", "keep", "refit", "format", "perplexity", "rise", "kl", "agreement", "bytes")
    keys = ("seeds", "default_over_best_other", "over_best_other", "best_other")
    figures = {key: found[key] for key in keys}
    show("quality without recovery", [{k: r[k] for k in shown} for r in found["rows"]], **figures)


if __name__ == "__main__":
    main()
