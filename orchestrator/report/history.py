"""How a run went, read from its events: every start of it, and what each stage took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.events import Event

_ENDS = ("run_done", "run_stopped", "run_failed", "observed")


@dataclass
class _Stage:
    """What one stage took over all starts; of a unit that ran twice, what its last run took."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    failed: int = 0

    def heed(self, event: Event) -> None:
        match event["event"]:
            case "unit_done":
                self.seconds[event["unit"]] = event.get("seconds", 0.0)
                self.peaks[event["unit"]] = event.get("peak_rss_bytes", 0)
            case "unit_lost" if event["retried"]:
                self.lost[event["cause"]] += 1
            case "unit_failed":
                self.failed += 1

    def facts(self) -> dict[str, Any]:
        slowest = max(self.seconds, key=self.seconds.__getitem__)
        return {
            "units": len(self.seconds),
            "seconds": round(sum(self.seconds.values()), 3),
            "slowest": [slowest, self.seconds[slowest]],
            "peak_rss_bytes": max(self.peaks.values()),
            "lost": dict(sorted(self.lost.items())),
            "failed": self.failed,
        }


def history(events: Iterable[Event]) -> dict[str, Any]:
    """The `history` of report.json.

    Returns:
        `starts`: one entry per start with `begun` (UTC), `seconds` up to the last sign of life,
        `units` that it finished itself, and `ended`: done, stopped, failed, observed, or killed;
        None for the start that writes the report. `stages`: stage -> `units`, `seconds` (summed
        over units, wherever they ran), `slowest` ([unit, seconds]), `peak_rss_bytes`, `lost`
        (cause -> attempts that were lost and tried again) and `failed` attempts.
    """
    starts: list[dict[str, Any]] = []
    stages: dict[str, _Stage] = {}
    for event in events:
        if event["event"] == "run_started":
            _note_end(starts, "killed")
            starts.append({"begun": event["time"], "last": event["time"], "units": 0})
        elif starts:
            starts[-1]["last"] = event["time"]
        if event["event"] in _ENDS:
            _note_end(starts, event["event"].removeprefix("run_"))
        if event["event"] == "unit_done" and starts and not event.get("resumed"):
            starts[-1]["units"] += 1
        if "stage" in event:
            stages.setdefault(event["stage"], _Stage()).heed(event)
    return {
        "starts": [_start(each) for each in starts],
        "stages": {name: stage.facts() for name, stage in stages.items() if stage.seconds},
    }


def _note_end(starts: list[dict[str, Any]], how: str) -> None:
    if starts:
        starts[-1].setdefault("ended", how)


def _start(noted: dict[str, Any]) -> dict[str, Any]:
    return {
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(noted["begun"])),
        "seconds": round(noted["last"] - noted["begun"], 3),
        "units": noted["units"],
        "ended": noted.get("ended"),
    }
