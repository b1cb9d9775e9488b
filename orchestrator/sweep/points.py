"""Every (method, budget) pair decided on one observation: bytes and predicted errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from models.errors import UserError
from orchestrator.curves import with_curves
from orchestrator.decide import decide
from orchestrator.needs import needs
from orchestrator.predictions import predicted, sampled_sums
from orchestrator.preflight import Prepared, Variant, expected_decisions, in_experts
from orchestrator.run_folder import MAIN
from orchestrator.sweep.config import label
from stages.calibrate.observer import Sums
from stages.calibrate.statistics import LayerStatistics, read_statistics
from stages.export.layout import file_layouts
from stages.group.config import AnyMethod, Budget
from stages.group.provide import provide
from stages.group.task import task_layers


@dataclass(frozen=True)
class Point:
    """One pair. A pair that cannot be has a reason and no numbers."""

    label: str
    method: AnyMethod
    format: str = ""
    refused: str | None = None
    bytes: int = 0
    original_bytes: int = 0
    # Layer -> experts, and neurons of each (0: all).
    experts: Mapping[int, int] = field(default_factory=dict)
    widths: Mapping[int, int] = field(default_factory=dict)
    # Layer -> squared error of its output over its energy, before any refit.
    errors: Mapping[int, float] = field(default_factory=dict)
    # Of the model that was built: perplexity, that of the original, KL.
    measured: Mapping[str, float] | None = None

    @property
    def mean_error(self) -> float | None:
        """Over layers; None: nothing was sampled."""
        return sum(self.errors.values()) / len(self.errors) if self.errors else None

    @property
    def worst(self) -> tuple[int, float] | None:
        """The layer with the largest error."""
        return max(self.errors.items(), key=lambda item: item[1]) if self.errors else None

    @property
    def reduction(self) -> float:
        """Share of the original's bytes that is gone."""
        return 1 - self.bytes / self.original_bytes

    @property
    def budget(self) -> str:
        """As `--build` takes it."""
        budget = self.method.budget
        return str(budget.keep_ratio if budget.target_bytes is None else budget.target_bytes)

    @property
    def slug(self) -> str:
        """A folder name."""
        return re.sub(r"[^A-Za-z0-9_.=-]+", "-", f"{self.label}-{self.budget}")

    def as_json(self) -> dict[str, Any]:
        """For sweep.json (docs/methods.md)."""
        found = {"method": self.label, "config": self.method.model_dump(mode="json")}
        if self.refused is not None:
            return found | {"refused": self.refused}
        return found | {
            "format": self.format,
            "experts": {str(layer): count for layer, count in self.experts.items()},
            "width": {str(layer): count for layer, count in self.widths.items() if count},
            "bytes": self.bytes,
            "reduction": self.reduction,
            "predicted_error": {
                "mean": self.mean_error,
                "layers": {str(layer): error for layer, error in self.errors.items()},
            },
            "measured": None if self.measured is None else dict(self.measured),
        }


def points(run: Prepared) -> list[Point]:
    """All pairs of the run's `sweep` section, in its order.

    Raises:
        StatisticsError: the observation cannot be read.
    """
    config, moe = run.config, run.moe
    task = config.group.task
    path = config.calibrate.statistics or run.folder.statistics
    wanted = set().union(*(needs(config, method) for method in config.sweep.compared))
    sampled = sampled_sums(config, task, run.folder, moe)
    layers = task_layers(read_statistics(path), task)
    statistics = provide(wanted, layers, moe, sampled)
    return [
        point(run, method, budget, statistics, sampled)
        for method in config.sweep.compared
        for budget in config.sweep.budgets
    ]


def point(
    run: Prepared,
    method: AnyMethod,
    budget: Budget,
    statistics: Sequence[LayerStatistics],
    sampled: Mapping[int, Sums],
) -> Point:
    """One pair, in the first format that holds it."""
    method = method.model_copy(update={"budget": budget, "task": run.config.group.task})
    found = Point(label(method), method)
    for form in formats(run, method):
        try:
            return _decided(run, found, form, statistics, sampled)
        except UserError as error:
            found = replace(found, refused=found.refused or str(error).splitlines()[0])
    return found


def formats(run: Prepared, method: AnyMethod) -> list[str]:
    """What is tried, in order."""
    wanted = run.config.sweep.format
    if wanted != "auto":
        return [wanted]
    if method.uneven:
        return ["mapped"]
    plain = method.may_drop or method.narrows
    return ["native", "mapped"] if plain else ["mapped", "native"]


def _decided(
    run: Prepared,
    found: Point,
    form: str,
    statistics: Sequence[LayerStatistics],
    sampled: Mapping[int, Sums],
) -> Point:
    export = run.config.export.model_copy(update={"format": form})
    variant = in_experts(Variant(MAIN, found.method, export), run.moe)
    expected_decisions(variant, run.moe)
    statistics = with_curves(found.method, statistics, sampled, run.folder, run.moe)
    decisions = decide(run.config, variant, statistics, run.moe)
    layouts = file_layouts(run.moe, decisions, export)
    return replace(
        found,
        format=form,
        refused=None,
        bytes=sum(layout.file_bytes for layout in layouts),
        original_bytes=run.moe.checkpoint.file_bytes,
        experts={each.layer: len(each.representatives) for each in decisions},
        widths={each.layer: each.width or 0 for each in decisions},
        errors={
            layer: float(parts.sum()) for layer, parts in predicted(decisions, sampled).items()
        },
    )
