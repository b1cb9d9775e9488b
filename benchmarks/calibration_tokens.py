"""Quality against the number of calibration tokens, and calibration on one domain alone.

The same product stages, settings and reported text as `benchmarks.quality`; every calibration token
is also part of the sample. One seed: differences between sizes are larger than those between seeds
at the small end and not at the large one. Results are kept in --out: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.output import show
from benchmarks.pages import show_or_put
from benchmarks.quality import BUNDLED, Task, all_work, claim, only_domain, rounded
from benchmarks.quality_cell import Setup
from benchmarks.quality_methods import Cell
from benchmarks.quality_summary import PARALLEL, summary
from benchmarks.quality_table import one_domain_table, tokens_table
from models.atomic import write_json
from orchestrator.run_folder import versions

TOKENS = (4096, 16_384, 65_536, 262_144)
QUICK = (2048, 4096)
# A refit of every layer for itself, which reads the sample, and a method that reads routing sums.
CELLS = (Cell(PARALLEL, 0.5, True), Cell("reap", 0.5, False))
# What stands between these lines of a page comes from the file.
MARKS = ("<!-- calibration: begin -->\n", "<!-- calibration: end -->\n")


def setup_of(options: argparse.Namespace) -> Setup:
    """The bundled model, or the one that is named."""
    data = Path(options.data or BUNDLED / "data").absolute()
    setup = Setup(
        model=Path(options.model or BUNDLED / "model").absolute(),
        calibration=data / "calibration.parquet",
        reported=data / "test.parquet",
        statistics=False,
    )
    return replace(setup, evaluated=5120, positions=64, prompts=1) if options.quick else setup


def plan(setup: Setup, sizes: Sequence[int], domain: str, out: Path) -> list[Task]:
    """One observation per size, and one of the second largest size on one domain alone."""
    every = [
        Task(replace(setup, tokens=size, sample=size), 0, out / f"tokens-{size}", CELLS)
        for size in sizes
    ]
    text = only_domain(setup.calibration, domain, out / f"{domain}.parquet")
    alone = replace(every[-2].setup, calibration=text)
    return [*every, Task(alone, 0, out / domain, CELLS)]


def collect(
    setup: Setup, tasks: Sequence[Task], results: Sequence[dict[str, Any]], domain: str
) -> dict[str, Any]:
    """Everything that is reported."""
    original = results[0]["original"]
    rows = [summary(original, each["cells"]) for each in results]
    sized = [
        {"tokens": task.setup.tokens, "rows": each}
        for task, each in zip(tasks[:-1], rows, strict=False)
    ]
    found: dict[str, Any] = {
        "benchmark": "quality against calibration tokens",
        "setup": {k: v for k, v in setup.settings().items() if k not in ("tokens", "sample")},
        "versions": versions(),
        "seeds": [0],
        "original": {key: value for key, value in original.items() if key != "continuations"},
        "calibration_tokens": sized,
        "one_domain": {"domain": domain, "tokens": tasks[-1].setup.tokens, "rows": rows[-1]},
    }
    brief: dict[str, Any] = rounded(found)
    return brief


def tables(found: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    one, sized = found["one_domain"], found["calibration_tokens"]
    mixed = next(each["rows"] for each in sized if each["tokens"] == one["tokens"])
    return (
        tokens_table(sized) + "\n\n" + one_domain_table({"rows": mixed, "one_domain": one}) + "\n"
    )


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small sizes")
    parser.add_argument("--model", help="checkpoint folder; the bundled one by default")
    parser.add_argument("--data", help="folder with calibration.parquet and test.parquet")
    parser.add_argument("--domain", default="code_python", help="for calibration on one domain")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--out", help="where results are kept and calibration.json is written")
    parser.add_argument("--table", type=Path, help="print the tables of such a file, run nothing")
    parser.add_argument("--page", type=Path, help="with --table: write them between a page's marks")
    return parser.parse_args(words)


def main() -> None:
    """Prints all rows; the last line is JSON. With --table: tables of a file, nothing is run."""
    options = options_of()
    if options.table:
        show_or_put(tables(json.loads(options.table.read_text())), options.page, MARKS)
        return
    setup = setup_of(options)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(options.out or scratch).absolute()
        claim(out, setup)
        tasks = plan(setup, QUICK if options.quick else TOKENS, options.domain, out)
        # The largest first: processes end at about the same time.
        results = all_work(tasks[::-1], options.processes)[::-1]
        found = collect(setup, tasks, results, options.domain)
        write_json(out / "calibration.json", found)
    shown = ("method", "refit", "perplexity", "rise", "kl")
    groups = [*found["calibration_tokens"], found["one_domain"]]
    rows = [
        {"tokens": group["tokens"], "text": group.get("domain", "all")} | {k: r[k] for k in shown}
        for group in groups
        for r in group["rows"]
    ]
    show("quality against calibration tokens", rows)


if __name__ == "__main__":
    main()
