"""The report tells of every start what the events say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.events import EventLog, read_events
from orchestrator.report.history import history
from orchestrator.report.html import render_html
from tests.orchestrator.test_interrupt import signal_when, start
from tests.orchestrator.tiny_run import Command, Inputs


def test_a_killed_start_a_lost_attempt_and_a_resumed_unit(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("run_started", run="r", resumes=False)
    log.emit("unit_done", stage="merge", unit="a", seconds=2.0, peak_rss_bytes=7, resumed=False)
    log.emit("unit_lost", stage="merge", unit="b", cause="lost", retried=True, times=1, error="x")
    log.emit("run_started", run="r", resumes=True)
    log.emit("unit_done", stage="merge", unit="a", seconds=2.0, peak_rss_bytes=7, resumed=True)
    log.emit("unit_lost", stage="merge", unit="b", cause="lost", retried=False, times=4, error="x")
    log.emit("unit_failed", stage="merge", unit="b", error="x")
    log.emit("run_failed", error="x", code=1)
    log.emit("run_started", run="r", resumes=True)
    log.emit("unit_done", stage="merge", unit="b", seconds=3.5, peak_rss_bytes=9, resumed=False)
    found = history(read_events(tmp_path / "events.jsonl"))
    assert [(each["ended"], each["units"]) for each in found["starts"]] == [
        ("killed", 1),
        ("failed", 0),
        (None, 1),
    ]
    assert found["stages"] == {
        "merge": {
            "units": 2,
            "seconds": 5.5,
            "slowest": ["b", 3.5],
            "peak_rss_bytes": 9,
            "lost": {"lost": 1},
            "failed": 1,
        }
    }
    page = render_html({"history": found, "seconds": {"merge": 5.5}})
    assert "Starts of this run" in page and "killed" in page and "1 lost, 1 failed" in page


def test_no_events_are_no_history() -> None:
    assert history([]) == {"starts": [], "stages": {}}


@pytest.mark.slow
def test_the_report_of_a_run_that_was_stopped_counts_both_starts(
    coalesce: Command, inputs: Inputs
) -> None:
    recipe = inputs.recipe(executor__kind="local", calibrate__shards=16)
    process = start(recipe)
    signal_when(process, inputs.run_dir, "calibration/shards/*.json", 15)
    process.communicate(timeout=120)
    assert coalesce("run", recipe, "--quiet").code == 0
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    first, second = report["history"]["starts"]
    assert (first["ended"], second["ended"]) == ("stopped", None)
    assert first["units"] > 0 and second["units"] > 0
    stages = report["history"]["stages"]
    markers = list(inputs.run_dir.glob("calibration/shards/*.json"))
    assert stages["calibrate"]["units"] == len(markers)
    assert report["seconds"]["calibrate"] == stages["calibrate"]["seconds"] > 0
    assert "Starts of this run" in (inputs.run_dir / "report" / "index.html").read_text()
