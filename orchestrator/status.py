"""What a run is doing or has done, read from its events alone: works from any node, at any time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.errors import RunFolderError
from orchestrator.estimate import human
from orchestrator.events import Event, read_events
from orchestrator.progress import STAGES, TURNS
from orchestrator.run_folder import RunFolder

_SLOWEST = 3


def stages(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Stage -> what the latest start of the run did in it.

    Keys: `state`, `units`, `done`, `resumed`, `seconds` (elapsed), `per_second` (units), `eta`
    (seconds, None where unknown), `peak` (bytes), `retries` (cause -> count), `failed` (unit ->
    error), `slowest` ([unit, seconds], the slowest first).

    Raises:
        RunFolderError: there is no run in the folder.
    """
    if not folder.identity.exists():
        raise RunFolderError(f"no run in {folder.root}", "give the run_dir of a started run")
    return _stages(read_events(folder.events), time.time())


def _stages(events: Iterable[Event], now: float) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    begun: dict[str, float] = {}
    for event in events:
        kind = event["event"]
        if kind == "run_started":
            found, begun = {}, {}
        if kind in ("run_failed", "run_stopped"):
            _end(found, begun, event)
        if "stage" not in event:
            continue
        stage = event["stage"]
        entry = found.setdefault(stage, _fresh())
        match kind:
            case "stage_started":
                entry["units"] += event["units"]
                entry["state"], begun[stage] = "running", event["time"]
            case "stage_done":
                entry["state"], entry["eta"] = "done", 0.0
                entry["seconds"] += event["seconds"]
                begun.pop(stage, None)
            case "unit_done":
                _count(entry, event)
            case "training":
                entry["eta"], entry["told"] = event.get("eta_seconds"), event["time"]
            case "unit_lost" if event["retried"]:
                entry["retries"][event["cause"]] += 1
            case "unit_failed":
                entry["failed"][event["unit"]] = event["error"]
    for stage, start in begun.items():
        entry = found[stage]
        entry["seconds"] = round(entry["seconds"] + max(now - start, 0), 3)
        if entry["eta"] is not None:
            entry["eta"] = round(max(entry["eta"] - (now - entry["told"]), 0), 1)
    for entry in found.values():
        del entry["told"]
    return found


def _fresh() -> dict[str, Any]:
    return {
        "state": "running", "units": 0, "done": 0, "resumed": 0, "seconds": 0.0,
        "per_second": None, "eta": None, "peak": 0, "retries": Counter(), "failed": {},
        "slowest": [], "told": 0.0,
    }  # fmt: skip


def _count(entry: dict[str, Any], event: Event) -> None:
    entry["done"] += 1
    entry["resumed"] += bool(event.get("resumed"))
    entry["eta"], entry["told"] = event.get("eta_seconds"), event["time"]
    entry["per_second"] = event.get("per_second")
    entry["peak"] = max(entry["peak"], event.get("peak_rss_bytes", 0))
    if "seconds" in event and not event.get("resumed"):
        timed = [*entry["slowest"], (event["unit"], event["seconds"])]
        entry["slowest"] = sorted(timed, key=lambda pair: -pair[1])[:_SLOWEST]


def _end(found: dict[str, dict[str, Any]], begun: dict[str, float], event: Event) -> None:
    """A failed or stopped run has nothing under way any more."""
    for stage, start in begun.items():
        entry = found[stage]
        entry["state"], entry["eta"] = event["event"].removeprefix("run_"), None
        entry["seconds"] = round(entry["seconds"] + event["time"] - start, 3)
    begun.clear()


def table(folder: RunFolder) -> Table:
    """One row per stage for a terminal."""
    shown = Table(title=f"{folder.root}: {headline(folder)}")
    for name in ("stage", "state", "units", "rate", "seconds", "ETA", "retries", "peak memory"):
        shown.add_column(name, justify="left" if name in ("stage", "state") else "right")
    found = stages(folder)
    turns = [stage for stage in TURNS if stage in found]
    for stage in sorted([*STAGES, *turns], key=lambda name: STAGES.index(TURNS.get(name, name))):
        entry = found.get(stage)
        if entry is None:
            shown.add_row(stage, "not needed" if headline(folder) == "finished" else "waiting")
            continue
        running = entry["state"] == "running"
        eta = f"{entry['eta']:.0f} s" if running and entry["eta"] is not None else ""
        rate = f"{entry['per_second']:.3g}/s" if entry["per_second"] else ""
        retries = ", ".join(f"{count} {cause}" for cause, count in entry["retries"].items())
        units, seconds = f"{entry['done']}/{entry['units']}", f"{entry['seconds']:.1f}"
        peak = human(entry["peak"])
        shown.add_row(stage, entry["state"], units, rate, seconds, eta, retries, peak)
    return shown


def details(folder: RunFolder) -> list[str]:
    """Lines under the table: failed units, and the slowest ones of stages of several units."""
    lines = []
    for stage, entry in stages(folder).items():
        lines += [f"failed: {unit}: {error}" for unit, error in entry["failed"].items()]
        if len(entry["slowest"]) > 1:
            named = ", ".join(f"{unit} {seconds:.1f} s" for unit, seconds in entry["slowest"])
            lines.append(f"slowest of {stage}: {named}")
    return lines


def as_json(folder: RunFolder) -> dict[str, Any]:
    """Everything that `status` shows, for programs."""
    return {
        "run": str(folder.root),
        "headline": headline(folder),
        "stages": stages(folder),
        "warnings": warnings(folder),
    }


def headline(folder: RunFolder) -> str:
    """finished, failed with the reason, or how long ago it last said something."""
    last: dict[str, Any] = {}
    for event in read_events(folder.events):
        last = event
    if not last:
        return "not started"
    if last["event"] == "run_done":
        return "finished"
    if last["event"] == "observed":
        return "observed; `coalesce run` goes on from here"
    if last["event"] == "run_stopped":
        return f"{last['error']}; `coalesce run` goes on from here"
    if last["event"] == "run_failed":
        return f"failed: {str(last['error']).splitlines()[0]}"
    return f"last sign of life {time.time() - last['time']:.0f} s ago"


def warnings(folder: RunFolder) -> list[str]:
    """What the latest start of the run warned of, each once."""
    found: dict[str, None] = {}
    for event in read_events(folder.events):
        if event["event"] == "run_started":
            found = {}
        elif event["event"] == "warning":
            found[str(event["message"])] = None
    return list(found)


def of(path: Path) -> RunFolder:
    """The run folder at a path."""
    return RunFolder(path.absolute())
