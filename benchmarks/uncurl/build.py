"""Observe a model once, then reduce it in many ways, all by the product's own stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.here import run_here
from benchmarks.uncurl.cells import Cell
from benchmarks.uncurl.recipes import EVERYTHING, RECIPES, Recipe
from benchmarks.uncurl.setup import BUNDLED, LENGTH, Setup
from benchmarks.uncurl.text import data_folder
from orchestrator import pipeline
from orchestrator.chain import written
from orchestrator.decide import decide
from orchestrator.load import validate
from orchestrator.needs import attached
from orchestrator.preflight import Prepared, Variant, prepare
from orchestrator.run import observe
from orchestrator.run_folder import MAIN, RunFolder
from stages.calibrate.statistics import read_statistics
from stages.export.layout import file_layouts
from stages.export.stage import assemble
from stages.group.decision import LayerDecision
from stages.group.task import task_layers
from stages.model import load_model


def observed(setup: Setup, model: Path, folder: Path, seed: int) -> Prepared:
    """What `coalesce calibrate` does, in this process; done already: read again."""
    source = {"path": str(data_folder(setup) / "calibration.parquet"), "domain_column": "domain"}
    data = {"sources": [source], "tokens": setup.tokens, "sequence_length": LENGTH, "seed": seed}
    run = prepare(
        validate(
            {
                "run_dir": folder,
                "model": {"path": str(model), "tokenizer": str(BUNDLED / "model")},
                "calibrate": {
                    "data": data,
                    "shards": 1,
                    "batch_size": 16,
                    "dtype": "float32",
                    # What enters the layers, for router rows by least squares.
                    "sample": {"tokens": min(4096, setup.tokens), "statistics": False},
                },
                "group": {"method": "frequency"},
                "executor": {"kind": "local"},
            }
        )
    )
    # One program may reduce while another one does: a finished observation is not locked again.
    statistics = run.folder.statistics if run.folder.statistics.exists() else observe(run)
    reuse = run.config.calibrate.model_copy(update={"statistics": statistics})
    return replace(run, config=run.config.model_copy(update={"calibrate": reuse}))


def reduced(run: Prepared, cell: Cell, folder: Path) -> tuple[Path, list[LayerDecision]]:
    """Writes the reduced model into `folder`; returns its own folder in there, and what was done.

    Without the reload gate: it is opened anyway.
    """
    shutil.rmtree(folder, ignore_errors=True)
    config = validate(run.config.model_dump(mode="json") | sections(cell) | {"run_dir": folder})
    variant = Variant(MAIN, config.group, config.written)
    run = replace(run, config=config, folder=RunFolder(folder), variants=(variant,))
    assert config.calibrate.statistics is not None
    statistics = task_layers(read_statistics(config.calibrate.statistics), config.group.task)
    statistics = attached(config, config.group, statistics, run.folder, run.moe)
    decisions = decide(config, variant, statistics, run.moe)
    layouts = file_layouts(run.moe, decisions, variant.export)
    units = pipeline.transform_units(run, variant, decisions, layouts)
    units = written(run, variant, decisions, units, run_here)
    (folder / "output").mkdir()
    assemble(pipeline.export_unit(run, variant, decisions, layouts, units), folder / "output")
    return folder / "output", decisions


def opened(folder: Path) -> Any:
    """A model in float32, with the modeling file beside it where there is one."""
    code = "auto_map" in json.loads((folder / "config.json").read_text())
    return load_model(folder, "float32", trust_remote_code=code)


def sections(cell: Cell) -> dict[str, Any]:
    """The sections of a run's config that a cell decides."""
    recipe: Recipe = RECIPES[cell.recipe]
    group: dict[str, Any] = recipe.group | {"budget": {"experts_per_layer": cell.kept}}
    if recipe.seeded:
        group["seed"] = cell.seed
    if cell.task != EVERYTHING:
        group["task"] = {cell.task: 1.0}
    # What is not named has its defaults, not what the observation had.
    plain: Mapping[str, Any] = {"export": {}, "align": {}, "refit": {"enabled": False}}
    if group.get("preset") == "paper":
        plain = {"align": {}, "refit": {}, "export": {"router": "reinit"}}
    return {**plain, **recipe.sections, "group": group}
