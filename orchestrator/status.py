"""What a run is doing or has done, read from its events alone: works from any node, at any time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.errors import RunFolderError
from orchestrator.estimate import human
from orchestrator.events import read_events
from orchestrator.progress import STAGES
from orchestrator.run_folder import RunFolder


def stages(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Stage -> units, done, seconds, peak memory, state, of the latest start of the run.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    if not folder.identity.exists():
        raise RunFolderError(f"no run in {folder.root}", "give the run_dir of a started run")
    found: dict[str, dict[str, Any]] = {}
    for event in read_events(folder.events):
        match event["event"]:
            case "run_started":
                found = {}
            case "stage_started":
                entry = found.setdefault(event["stage"], _fresh())
                entry["units"] += event["units"]
                entry["state"] = "running"
            case "unit_done":
                _count(found.setdefault(event["stage"], _fresh()), event)
            case "stage_done":
                entry = found.setdefault(event["stage"], _fresh())
                entry["state"] = "done"
                entry["seconds"] += event["seconds"]
            case "run_failed" | "run_stopped":
                state = event["event"].removeprefix("run_")
                for entry in found.values():
                    entry["state"] = state if entry["state"] == "running" else entry["state"]
    return found


def table(folder: RunFolder) -> Table:
    """One row per stage for a terminal."""
    shown = Table(title=f"{folder.root}: {headline(folder)}")
    for name in ("stage", "state", "units", "seconds", "ETA", "peak memory"):
        shown.add_column(name, justify="left" if name in ("stage", "state") else "right")
    found = stages(folder)
    for stage in STAGES:
        entry = found.get(stage)
        if entry is None:
            shown.add_row(stage, "waiting", "", "", "", "")
            continue
        units = f"{entry['done']}/{entry['units']}"
        eta = "" if entry["state"] == "done" else f"{entry['eta']:.0f} s"
        seconds = f"{entry['seconds']:.1f}"
        shown.add_row(stage, entry["state"], units, seconds, eta, human(entry["peak"]))
    return shown


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


def _fresh() -> dict[str, Any]:
    return {"units": 0, "done": 0, "seconds": 0.0, "eta": 0.0, "peak": 0, "state": "running"}


def _count(entry: dict[str, Any], event: dict[str, Any]) -> None:
    entry["done"] += 1
    entry["eta"] = event.get("eta_seconds", 0.0)
    entry["peak"] = max(entry["peak"], event.get("peak_rss_bytes", 0))
