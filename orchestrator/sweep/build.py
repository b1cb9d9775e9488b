"""Chosen points as normal runs of their own, on the statistics that exist."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.load import validate
from orchestrator.preflight import Prepared, prepare
from orchestrator.run_folder import RunFolder
from orchestrator.sweep.points import Point


def chosen(points: Sequence[Point], words: Sequence[str]) -> list[int]:
    """Indices of the points named by METHOD:BUDGET words.

    Raises:
        ConfigError: a word names no point, or one that cannot be built.
    """
    return [_index(points, word) for word in words]


def _index(points: Sequence[Point], word: str) -> int:
    name, _, budget = word.rpartition(":")
    for index, point in enumerate(points):
        if name in (point.label, point.method.method) and _same(budget, point.budget):
            if point.refused is not None:
                raise ConfigError(f"{word} cannot be built: {point.refused}", "choose another")
            return index
    known = ", ".join(f"{point.label}:{point.budget}" for point in points if not point.refused)
    raise ConfigError(f"{word!r} names no point of the sweep", f"one of: {known}")


def _same(first: str, second: str) -> bool:
    with suppress(ValueError):
        return float(first) == float(second)
    return False


def sub_run(run: Prepared, point: Point) -> Prepared:
    """The run that makes a point, in a folder below the sweep's."""
    values: dict[str, Any] = run.config.model_dump(mode="json", exclude={"sweep", "slurm"})
    values["run_dir"] = str(run.folder.sweep / point.slug)
    values["group"] = point.method.model_dump(mode="json")
    values["export"]["format"] = point.format
    statistics = run.config.calibrate.statistics or run.folder.statistics
    values["calibrate"]["statistics"] = str(statistics.absolute())
    values["model"]["verify"] = "headers"  # was read when the statistics were made
    if values["evaluate"] is not None:
        values["evaluate"]["baselines"] = []
    return prepare(validate(values))


def with_measured(run: Prepared, points: Sequence[Point]) -> list[Point]:
    """The points with the numbers of those that were built, now or earlier."""
    return [replace(point, measured=measured(run, point)) for point in points]


def measured(run: Prepared, point: Point) -> dict[str, float] | None:
    """Perplexity and KL from the point's report; None: it was not built."""
    source = RunFolder(run.folder.sweep / point.slug).report / "report.json"
    if point.refused is not None or not source.exists():
        return None
    report = json.loads(source.read_text())
    found = {"bytes": report["bytes"]["after"]}
    perplexity = report.get("perplexity") or {}
    if "compressed" in perplexity:
        found["perplexity"] = perplexity["compressed"]["overall"]
        found["original"] = perplexity["original"]["overall"]
    kl = (report.get("kl") or {}).get("compressed")
    return found | ({} if kl is None else {"kl": kl["overall"]})


def build(run: Prepared, point: Point, supervised: Callable[[Prepared], object]) -> None:
    """Makes one point unless its report exists; `supervised` runs a prepared run."""
    job = sub_run(run, point)
    if not (job.folder.report / "report.json").exists():
        supervised(job)
