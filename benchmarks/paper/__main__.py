"""The tables of arXiv 2310.01334 on two small models, three seeds; cell by cell, resumable.

python -m benchmarks.paper --work FOLDER             measure; writes FOLDER/paper.json
python -m benchmarks.paper --table docs/results/paper.json --page docs/paper.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import show_or_put
from benchmarks.paper.cells import Cell, cells
from benchmarks.paper.figure import draw
from benchmarks.paper.seed import Seed, Setup
from benchmarks.paper.switch import BUNDLED, Recipe, make
from benchmarks.paper.tables import MARKS, tables
from models.atomic import write_json
from orchestrator.run_folder import versions

SETUPS = (Setup("bundled"), Setup("switch", batch=16))
SEEDS = (0, 1, 2)


def quick(setup: Setup) -> Setup:
    """As little text as there can be."""
    return replace(setup, windows=3, observed=960, steps=2, batch=5)


def measured(
    work: Path,
    setups: Sequence[Setup],
    seeds: Sequence[int],
    recipe: Recipe,
    chosen: Sequence[Cell],
) -> Any:
    """The cells of every model and seed, seed by seed, and what they were made with."""
    folders = {"bundled": BUNDLED / "model", "switch": make(work / "switch", recipe)}
    found: list[dict[str, Any]] = []
    for seed in seeds:
        for setup in setups:
            place = work / setup.model / f"seed-{seed}"
            one = Seed(setup, seed, folders[setup.model].absolute(), place.absolute())
            for cell in chosen:
                found.append({"model": setup.model} | one.cell(cell))
                print(f"{setup.model} seed {seed} {cell.slug} {found[-1]['loss']:.3f}", flush=True)
    return {
        "benchmark": "paper",
        "setups": [asdict(each) for each in setups],
        "seeds": list(seeds),
        "switch": json.loads((work / "switch" / "recipe.json").read_text()),
        "versions": versions(),
        "cells": found,
    }


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="cells are kept here; a second call goes on")
    parser.add_argument("--quick", action="store_true", help="one seed, little text: no result")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--models", nargs="+", default=[each.model for each in SETUPS])
    parser.add_argument("--table", type=Path, help="show the tables of such a file, run nothing")
    parser.add_argument("--page", type=Path, help="with --table: write them between its marks")
    parser.add_argument("--figure", type=Path, help="with --table: draw the rows into this file")
    options = parser.parse_args()
    if options.table:
        found = json.loads(options.table.read_text())
        show_or_put(tables(found), options.page, MARKS)
        if options.figure:
            draw(found, options.figure)
        return
    torch.set_num_threads(1)
    setups = [each for each in SETUPS if each.model in options.models]
    seeds, recipe = tuple(options.seeds), Recipe()
    if options.quick:
        setups, seeds, recipe = [*map(quick, setups)], (0,), Recipe(steps=20, windows=2)
    found = measured(options.work, setups, seeds, recipe, cells())
    write_json(options.work / "paper.json", found)


if __name__ == "__main__":
    main()
