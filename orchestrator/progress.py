"""What a person sees while a run goes on: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from orchestrator.events import Event, Listener

STAGES = (
    "verify", "corpus", "calibrate", "inputs", "subsample", "probe",
    "group", "threshold", "transform", "export", "teach", "recover", "evaluate", "report",
)  # fmt: skip
# Takes turns with another stage, in some runs.
TURNS = {"carry": "transform"}
_LINE_EVERY_SECONDS = 10.0


@contextmanager
def listener(console: Console) -> Iterator[Listener]:
    """A listener that fits the console."""
    if not console.is_terminal:
        yield PlainLines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)


class PlainLines:
    """Timestamped lines; within a stage one every ten seconds at most."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        """Prints what is worth a line."""
        text = describe(event)
        if event["event"] in ("unit_done", "training"):
            if event["time"] - self._last < _LINE_EVERY_SECONDS:
                return
            self._last = event["time"]
        if text:
            stamp = time.strftime("%H:%M:%S", time.localtime(event["time"]))
            self._console.print(f"{stamp} {text}", highlight=False, soft_wrap=True, markup=False)


class Bars:
    """One bar per stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Moves the bar of the current stage."""
        kind = event["event"]
        if kind == "stage_started":
            self._task = self._progress.add_task(
                _title(event["stage"]), total=event["units"], rate=""
            )
        elif kind == "unit_done" and self._task is not None:
            self._progress.update(self._task, advance=1, rate=throughput(event))
        elif kind == "training" and self._task is not None:
            self._progress.update(self._task, rate=_training(event))
        if kind in ("warning", "resuming", "engine", "unit_lost", "taken_over"):
            self._progress.console.print(describe(event), highlight=False, markup=False)


def _training(event: Event) -> str:
    return f"step {event['step']}/{event['steps']}, loss {event['loss']:.3f}"


def describe(event: Event) -> str:
    """One line for an event, or nothing."""
    stage = _title(event["stage"]) if "stage" in event else ""
    match event["event"]:
        case "stage_started":
            return f"{stage}: {event['units']} units"
        case "resuming":
            return f"{stage}: resuming: {event['done']}/{event['units']} done"
        case "training":
            return f"{stage}: {_training(event)}, {event['eta_seconds']:.0f} s left"
        case "unit_done":
            left = f", {event['eta_seconds']:.0f} s left" if event.get("eta_seconds") else ""
            speed = throughput(event)
            return f"{stage}: {event['done']}/{event['units']} {speed}{left}"
        case "stage_done":
            return f"{stage}: done in {event['seconds']:.1f} s"
        case "engine":
            return f"{stage}: {event['engine']} engine: {event['why']}"
        case "unit_lost":
            then = "run again" if event["retried"] else "no retry is left"
            return f"{stage}: {event['unit']}: {event['cause']}, {then}"
        case "taken_over":
            return (
                f"{event['holder']} worked on this run and did not say that it ended; if it still"
                " works (some file systems keep locks to one host), end it"
            )
        case "warning":
            return f"warning: {event['message']}"
    return ""


def throughput(event: Event) -> str:
    """Tokens or bytes per second, when the unit says how much it did."""
    amount, seconds = event.get("amount"), event.get("elapsed_seconds") or 0
    if not amount or not seconds:
        return ""
    rate = amount / seconds
    return f"{rate:,.0f} tokens/s" if event.get("of") == "tokens" else f"{rate / 1e6:,.1f} MB/s"


def _title(stage: str) -> str:
    place = TURNS.get(stage, stage)
    if place not in STAGES:
        return stage
    return f"[{STAGES.index(place) + 1}/{len(STAGES)}] {stage}"
