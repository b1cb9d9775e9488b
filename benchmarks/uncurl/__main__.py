"""How far can models of 8, 16 and 32 experts be reduced for one task? (arXiv 2409.01483)

    python -m benchmarks.uncurl --out OUT
    python -m benchmarks.uncurl --table docs/results/uncurl.json --page docs/uncurl.md

Trains the models, reduces them, tunes them, and writes OUT/uncurl.json. The same command goes on
where it ended; `--held` reports what is there so far. `--quick` does everything at a size at which
nothing is learnt.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.pages import show_or_put
from benchmarks.uncurl.cells import PLAIN, ROUTER_ONLY, TWO_STAGE, Cell, cells
from benchmarks.uncurl.figure import draw
from benchmarks.uncurl.measure import Measurer
from benchmarks.uncurl.setup import Setup, quick
from benchmarks.uncurl.summary import summarised
from benchmarks.uncurl.table import MARKS, tables
from benchmarks.uncurl.trained import held_out, train
from models.atomic import write_json
from orchestrator.run_folder import versions


def measure(setup: Setup, only: str | None) -> None:
    """Everything that is missing, the cheapest first.

    Args:
        only: a kind of tuning; then nothing is trained, and copies are not looked for.
    """
    measurer = Measurer(setup)
    for seed in setup.seeds if only is None else ():
        train(setup, seed)
        measurer.planted(seed)
    for cell in cells(setup):
        if only in (None, cell.tuning):
            found = measurer.cell(cell)
            print(json.dumps({"cell": cell.slug, "losses": found["losses"]}), file=sys.stderr)


def held(setup: Setup) -> dict[str, Any]:
    """What was measured so far, as the file of results has it."""
    measurer = Measurer(setup)
    rows = [measurer.cell(cell) for cell in cells(setup) if measurer.path(cell).exists()]
    found = [(Cell(**{k: row[k] for k in Cell.__dataclass_fields__}), row) for row in rows]
    planted = [
        json.loads(path.read_text()) for path in sorted(setup.out.glob("cells/planted-*.json"))
    ]
    return {
        "benchmark": "uncurl",
        "setup": setup.settings(),
        "versions": versions(),
        "trained": held_out(setup),
        **summarised(setup.tasks[0], found, planted),
    }


def _changed(setup: Setup, options: argparse.Namespace) -> Setup:
    """The setup with what the command line asks for."""
    changes: dict[str, Any] = {
        name: tuple(value)
        for name in ("seeds", "sizes")
        if (value := getattr(options, name)) is not None
    }
    if options.steps is not None:
        changes["recipe"] = {**setup.recipe, "steps": options.steps}
    return replace(setup, **changes)


def main() -> None:
    """Command line entry point; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models, nothing is learnt")
    parser.add_argument("--out", type=Path, help="where models and cells are kept")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the models")
    parser.add_argument("--steps", type=int, help="of training, instead of those of sizes.yaml")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of experts that are trained")
    parser.add_argument("--threads", type=int, default=1)
    kinds = (PLAIN, ROUTER_ONLY, TWO_STAGE)
    parser.add_argument("--only", choices=kinds, help="of the models that are there, these alone")
    parser.add_argument("--held", action="store_true", help="measure nothing more")
    parser.add_argument("--table", type=Path, help="print the tables of a file, run nothing")
    parser.add_argument("--page", type=Path, help="with --table: write them between its marks")
    parser.add_argument("--figure", type=Path, help="with --table: draw it there")
    options = parser.parse_args()
    if options.table:
        found = json.loads(options.table.read_text())
        if options.figure:
            draw(found, options.figure)
        show_or_put(tables(found), options.page, MARKS)
        return
    if options.out is None:
        parser.error("--out or --table is needed")
    setup = Setup(options.out.absolute(), threads=options.threads)
    setup = quick(setup) if options.quick else setup
    setup = _changed(setup, options)
    if not options.held:
        measure(setup, options.only)
    found = held(setup)
    write_json(setup.out / "uncurl.json", found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
