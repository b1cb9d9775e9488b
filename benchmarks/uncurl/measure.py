"""Cells to numbers, each kept in a file of its own, so that a cut run goes on where it ended."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.uncurl.build import observed, opened, reduced
from benchmarks.uncurl.cells import PLAIN, ROUTER_ONLY, Cell
from benchmarks.uncurl.planted import adjusted_rand, clone
from benchmarks.uncurl.recipes import EVERYTHING, GROUPINGS, SCRATCH
from benchmarks.uncurl.setup import Setup
from benchmarks.uncurl.text import windows
from benchmarks.uncurl.trained import model_folder
from benchmarks.uncurl.tune import mean_loss, routers_alone, two_stages, write_corpus
from models.atomic import write_json
from orchestrator.preflight import Prepared

COPIES = 4
NOISE = 1e-3  # of the router's rows
TRAINING_TOKENS = 131_072  # of a task, more than tuning sees


class Measurer:
    """Observations and text are read once."""

    def __init__(self, setup: Setup) -> None:
        """Nothing is done yet."""
        self.setup = setup
        self._runs: dict[tuple[int, int], Prepared] = {}
        self._windows: dict[tuple[str, str], Tensor] = {}

    def cell(self, cell: Cell) -> dict[str, Any]:
        """A cell's losses, from its file if it was measured before."""
        path = self.path(cell)
        if not path.exists():
            torch.set_num_threads(self.setup.threads)
            began = time.process_time()
            found = self._measure(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(cell) | found | {"cpu_seconds": time.process_time() - began})
        made: dict[str, Any] = json.loads(path.read_text())
        return made

    def path(self, cell: Cell) -> Path:
        """The file of a cell."""
        return self.setup.out / "cells" / f"{cell.slug}.json"

    def losses(self, folder: Path) -> dict[str, float]:
        """Cross-entropy of every task's held-out text, nats per token."""
        model = opened(folder)
        return {task: mean_loss(model, self._held_out(task)) for task in self.setup.tasks}

    def run(self, seed: int, experts: int) -> Prepared:
        """The observation of a trained model."""
        if (seed, experts) not in self._runs:
            model = model_folder(self.setup, seed, experts)
            folder = self.setup.out / f"seed{seed}" / f"observed-e{experts}"
            self._runs[seed, experts] = observed(self.setup, model, folder, seed)
        return self._runs[seed, experts]

    def planted(self, seed: int) -> dict[str, Any]:
        """The smallest model's experts copied, found again, and the losses on the way."""
        path = self.setup.out / "cells" / f"planted-{seed}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"seed": seed} | self._planted(seed))
        made: dict[str, Any] = json.loads(path.read_text())
        return made

    def _planted(self, seed: int) -> dict[str, Any]:
        experts = min(self.setup.kept)
        source = model_folder(self.setup, seed, experts)
        folder = self.setup.out / f"seed{seed}" / "copied"
        shutil.rmtree(folder, ignore_errors=True)
        clone(source, folder / "model", COPIES, NOISE, seed)
        run = observed(self.setup, folder / "model", folder / "observed", seed)
        found: dict[str, Any] = {"experts": experts, "copies": COPIES, "noise": NOISE}
        for name, path in (("original", source), ("copied", folder / "model")):
            found[name] = {"losses": self.losses(path)}
        labels = list(range(experts)) * COPIES
        for recipe in GROUPINGS:
            cell = Cell(seed, experts * COPIES, experts, recipe, EVERYTHING)
            model, decisions = reduced(run, cell, folder / "work")
            found[recipe] = {"losses": self.losses(model)}
            if not any(group is None for each in decisions for group in each.group):
                groups = [[int(group or 0) for group in each.group] for each in decisions]
                found[recipe]["adjusted_rand"] = [adjusted_rand(each, labels) for each in groups]
        return found

    def _measure(self, cell: Cell) -> dict[str, Any]:
        work = self.setup.out / "work" / cell.slug
        if cell.recipe == SCRATCH:
            model, facts = model_folder(self.setup, cell.seed, cell.experts), {}
        else:
            model, decisions = reduced(self.run(cell.seed, cell.experts), cell, work / "reduced")
            facts = {"sizes": [sorted(map(len, each.members))[::-1] for each in decisions]}
        losses = self._traced(model, cell, work / "tuned")
        shutil.rmtree(work, ignore_errors=True)
        return facts | {"losses": losses}

    def _traced(self, model: Path, cell: Cell, work: Path) -> dict[str, dict[str, float]]:
        """Losses per task at the marks of the cell's tuning."""
        setup = self.setup
        if cell.tuning == PLAIN:
            return {"before": self.losses(model)}
        corpus = work / "corpus.arrow"
        write_corpus(corpus, cell.task, self._text("calibration", cell.task, TRAINING_TOKENS))
        if cell.tuning == ROUTER_ONLY:
            marks = setup.router_steps
            return routers_alone(model, corpus, setup.tuning, marks, self.losses, work)
        return two_stages(model, corpus, setup.tuning, self.losses, work)

    def _held_out(self, task: str) -> Tensor:
        return self._text("test", task, self.setup.evaluated)

    def _text(self, name: str, domain: str, tokens: int) -> Tensor:
        if (name, domain) not in self._windows:
            self._windows[name, domain] = windows(self.setup, name, domain, tokens)
        return self._windows[name, domain]
