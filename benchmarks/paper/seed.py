"""One seed of one model: observed once, then every cell built, trained and measured, each once."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.here import run_here
from benchmarks.paper.cells import Cell
from benchmarks.paper.similarity import inputs_of, regrouped
from benchmarks.paper.switch import BUNDLED, streams
from benchmarks.paper.switch_student import recover as recover_switch
from benchmarks.paper.switch_student import reduce
from benchmarks.paper.text import Windows, measure, windows
from models.atomic import write_json
from orchestrator import pipeline, threshold
from orchestrator.decide import decide
from orchestrator.flops import parameters, per_token
from orchestrator.load import validate
from orchestrator.preflight import Prepared, Variant, prepare
from orchestrator.run import observe
from orchestrator.run_folder import MAIN, RunFolder
from stages.calibrate.statistics import read_statistics
from stages.compress.config import CompressConfig
from stages.export.config import ExportConfig
from stages.export.layout import file_layouts
from stages.export.stage import assemble
from stages.group.decision import LayerDecision
from stages.group.task import task_layers
from stages.model import load_model
from stages.recover.api import recover
from stages.recover.config import RecoverConfig
from stages.recover.teach import teach
from stages.transform import stage as transform
from stages.unit import execute


@dataclass(frozen=True)
class Setup:
    """Everything that numbers depend on beside cell and seed."""

    model: str  # `bundled` or `switch`
    keep: float = 0.5  # of the experts
    ratio: float = 0.25  # of a matrix's values, in U and V
    sparse: float = 0.1  # of the rows of S
    piece: int = 48  # tokens of a source, and of a target
    windows: int = 12  # per domain that is reported
    observed: int = 24_576  # tokens
    steps: int = 16  # of recovery
    batch: int = 8  # windows per step
    rate: float = 2e-3
    alpha: float = 1.0
    temperature: float = 2.0

    def compress(self, cell: Cell) -> CompressConfig:
        """How MC-SMoE's experts are decomposed."""
        return CompressConfig(ratio=self.ratio, sparse=self.sparse, threshold=cell.threshold)


@dataclass(frozen=True)
class Seed:
    """A seed draws calibration text, reported windows, chance, and the order of training."""

    setup: Setup
    seed: int
    model: Path
    folder: Path

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Numbers of one cell, from its file if it was measured before."""
        path = self.folder / "cells" / f"{cell.slug}.json"
        if not path.exists():
            begun = time.process_time()
            decisions = self._decisions(cell)
            student = self._student(cell, decisions)
            found = measure(student, self.asked) | self._sizes(cell, decisions)
            found["cpu_seconds"] = round(time.process_time() - begun, 1)
            write_json(path, {"seed": self.seed, "cell": asdict(cell)} | found)
        measured: dict[str, Any] = json.loads(path.read_text())
        return measured

    @cached_property
    def run(self) -> Prepared:
        """The observation, made by what `coalesce calibrate` calls."""
        source = {"path": str(BUNDLED / "data/calibration.parquet"), "domain_column": "domain"}
        length = 2 * self.setup.piece
        data = {"sources": [source], "sequence_length": length, "seed": self.seed}
        config = {
            "run_dir": self.folder / "run",
            "model": {"path": str(self.model), "verify": "headers"},
            "calibrate": {
                "data": data | {"tokens": self.setup.observed},
                "sample": {"tokens": 0},
                "shards": 1,
                "batch_size": 16,
                "dtype": "float32",
                "engine": "resident",
            },
            "group": {"method": "mc_smoe"},
            "executor": {"kind": "local"},
        }
        run = prepare(validate(config))
        observe(run)
        return run

    @cached_property
    def asked(self) -> Windows:
        """What is reported, of the test text."""
        found = self._streams("test")
        return windows(found, self.setup.windows, self.setup.piece, self.seed)

    @cached_property
    def original(self) -> Any:
        """The opened original, which is only read."""
        return load_model(self.model, "float32")

    def _streams(self, kind: str) -> dict[str, Tensor]:
        """Token ids per domain; kept beside the seeds, since all use the same."""
        path = self.folder.parent / f"{kind}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(streams(BUNDLED / "data" / f"{kind}.parquet", self.model), path)
        found: dict[str, Tensor] = torch.load(path, weights_only=True)
        return found

    def _decisions(self, cell: Cell) -> list[LayerDecision]:
        if cell.method == "full":
            return []
        run, form = self.run, self._format(cell)
        group = validate(
            run.config.model_dump(mode="json") | {"group": cell.group(self.seed, self.setup.keep)}
        ).group
        statistics = task_layers(read_statistics(run.folder.statistics), None)
        decisions = decide(run.config, Variant(MAIN, group, form), statistics, run.moe)
        if cell.method != "merge" or cell.similarity == "router logits":
            return decisions
        shown = windows(self._streams("calibration"), 2, self.setup.piece, self.seed)
        inputs = inputs_of(self.original, torch.cat(shown.sources), torch.cat(shown.targets))
        return regrouped(decisions, cell.similarity, run.moe, inputs, self.seed)

    def _format(self, cell: Cell) -> ExportConfig:
        """What holds such decisions; a Switch model is not written, but must be possible."""
        if cell.method == "prune":
            return ExportConfig(format="native")
        compress = self.setup.compress(cell) if cell.decomposed else None
        form = "expanded" if self.setup.model == "switch" else "mapped"
        return ExportConfig.model_validate({"format": form, "compress": compress})

    def _student(self, cell: Cell, decisions: list[LayerDecision]) -> Any:
        if cell.method == "full":
            return self.original
        if self.setup.model == "switch":
            return self._switch(cell, decisions)
        folder = self._written(cell, decisions)
        if cell.recovery != "none":
            folder = self._recovered(cell, folder)
        student = load_model(folder, "float32", trust_remote_code=cell.method != "prune")
        shutil.rmtree(self.folder / "work")
        return student

    def _switch(self, cell: Cell, decisions: list[LayerDecision]) -> Any:
        student = load_model(self.model, "float32")
        reduce(student, self.run.moe, decisions, cell, self.setup.compress(cell))
        if cell.recovery != "none":
            self._train_switch(cell, student)
        return student

    def _train_switch(self, cell: Cell, student: Any) -> None:
        setup = self.setup
        each = setup.steps * setup.batch // len(self.asked.domains)
        shown = windows(self._streams("calibration"), each, setup.piece, self.seed)
        sources, targets = torch.cat(shown.sources), torch.cat(shown.targets)
        order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(self.seed))
        rows = [order[i : i + setup.batch] for i in range(0, len(order), setup.batch)]
        batches = [(sources[i], targets[i]) for i in rows]
        alpha = setup.alpha if cell.recovery == "distillation" else 0.0
        options = {"temperature": setup.temperature, "rate": setup.rate}
        recover_switch(student, self.original, batches, alpha=alpha, **options)

    def _written(self, cell: Cell, decisions: list[LayerDecision]) -> Path:
        """The reduced checkpoint, by the stages of a run; without the reload gate."""
        root = self.folder / "work"
        shutil.rmtree(root, ignore_errors=True)
        base = self.run
        changes = {
            "align": {"enabled": cell.aligned},
            "merge": {"weights": cell.weights},
            "refit": {"enabled": False},
        }
        config = validate(base.config.model_dump(mode="json") | changes)
        variant = Variant(MAIN, config.group, self._format(cell))
        run = Prepared(**vars(base) | {"config": config, "folder": RunFolder(root)})
        variant = threshold.settled(run, variant, decisions, run_here, lambda table: table)
        layouts = file_layouts(run.moe, decisions, variant.export)
        units = pipeline.transform_units(run, variant, decisions, layouts)
        for unit in units:
            execute(unit, transform.run_one)
        (root / "output").mkdir()
        assemble(pipeline.export_unit(run, variant, decisions, layouts, units), root / "output")
        return root / "output"

    def _recovered(self, cell: Cell, student: Path) -> Path:
        setup = self.setup
        config = RecoverConfig(
            mode="experts",
            steps=setup.steps,
            batch=setup.batch,
            seed=self.seed,
            alpha=setup.alpha if cell.recovery == "distillation" else 0.0,
            temperature=setup.temperature,
            learning_rate=setup.rate,
            schedule="linear",
            warmup=1,
        )
        corpus, said = self.run.folder.calibration_tokens, self.folder / "taught.arrow"
        if not said.exists():
            teach(self.model, corpus, said, config)
        target = self.folder / "work" / "recovered"
        recover(student, target, config, corpus, [said] if config.alpha else [])
        return target

    def _sizes(self, cell: Cell, decisions: list[LayerDecision]) -> dict[str, int]:
        compress = self.setup.compress(cell) if cell.decomposed else None
        moe = self.run.moe
        return {
            "parameters": parameters(moe, decisions, compress),
            "flops_per_token": per_token(moe, decisions, compress),
        }
