"""events.jsonl, and what status and progress make of it."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.errors import RunFolderError
from orchestrator.events import Event, EventLog, read_events
from orchestrator.progress import STAGES, describe, listener
from orchestrator.run_folder import RunFolder
from orchestrator.status import as_json, details, headline, stages, table
from tests.orchestrator.tiny_run import Command, Inputs


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run.json").write_text("{}")
    return RunFolder(tmp_path)


@pytest.fixture
def log(folder: RunFolder) -> EventLog:
    return EventLog(folder.events)


def kinds(folder: RunFolder) -> list[str]:
    return [event["event"] for event in read_events(folder.events)]


def shown(folder: RunFolder) -> str:
    text = io.StringIO()
    Console(file=text, width=140).print(table(folder))
    return text.getvalue()


# The file -----------------------------------------------------------------------------------------


def test_an_event_is_one_line_of_json_with_its_time(folder: RunFolder, log: EventLog) -> None:
    log.emit("warning", message="two\nlines")
    (line,) = folder.events.read_text().splitlines()
    event = json.loads(line)
    assert (event["event"], event["message"]) == ("warning", "two\nlines")
    assert event["time"] > 1.7e9


def test_listeners_hear_what_is_written(folder: RunFolder) -> None:
    heard: list[Event] = []
    EventLog(folder.events, [heard.append]).emit("run_started", run="x")
    assert heard == list(read_events(folder.events))


def test_a_file_that_is_not_there_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "events.jsonl")) == []


def test_a_last_line_that_was_cut_off_is_passed_over(folder: RunFolder, log: EventLog) -> None:
    log.emit("run_started")
    log.emit("stage_started", stage="verify", units=1)
    folder.events.write_bytes(folder.events.read_bytes()[:-9])
    assert kinds(folder) == ["run_started"]


def test_an_event_after_a_cut_off_line_is_not_lost(folder: RunFolder, log: EventLog) -> None:
    log.emit("run_started")
    log.emit("stage_started", stage="verify", units=1)
    folder.events.write_bytes(folder.events.read_bytes()[:-9])
    EventLog(folder.events).emit("run_failed", error="killed", code=1)
    assert kinds(folder) == ["run_started", "run_failed"]


# Status -------------------------------------------------------------------------------------------


def begin(log: EventLog) -> None:
    log.emit("run_started", run="x", resumes=False)
    log.emit("stage_started", stage="verify", units=1)
    log.emit("unit_done", stage="verify", unit="v", done=1, units=1, peak_rss_bytes=5_000_000)
    log.emit("stage_done", stage="verify", seconds=2.5)
    log.emit("stage_started", stage="calibrate", units=4)
    log.emit("unit_done", stage="calibrate", unit="a", done=1, units=4, eta_seconds=30.0)


def test_a_running_run_shows_its_stage_units_and_time_left(
    folder: RunFolder, log: EventLog
) -> None:
    begin(log)
    found = stages(folder)
    assert (found["verify"]["state"], found["verify"]["seconds"]) == ("done", 2.5)
    running = found["calibrate"]
    assert (running["units"], running["done"], running["state"]) == (4, 1, "running")
    assert 29 < running["eta"] <= 30 and 0 <= running["seconds"] < 5
    assert "last sign of life" in headline(folder)
    assert "1/4" in shown(folder) and "30 s" in shown(folder) and "waiting" in shown(folder)


def test_a_failed_run_shows_why_and_where(folder: RunFolder, log: EventLog) -> None:
    begin(log)
    log.emit("run_failed", error="no space left\n  -> free some", code=2)
    assert headline(folder) == "failed: no space left"
    states = {stage: entry["state"] for stage, entry in stages(folder).items()}
    assert states == {"verify": "done", "calibrate": "failed"}


def test_a_run_that_was_started_again_shows_the_latest_start_only(
    folder: RunFolder, log: EventLog
) -> None:
    begin(log)
    log.emit("run_failed", error="killed", code=1)
    log.emit("run_started", run="x", resumes=True)
    log.emit("stage_started", stage="verify", units=1)
    assert list(stages(folder)) == ["verify"]
    assert stages(folder)["verify"]["done"] == 0


def test_a_stage_whose_start_was_cut_off_is_still_shown(folder: RunFolder, log: EventLog) -> None:
    log.emit("stage_done", stage="corpus", seconds=1.0)
    assert stages(folder)["corpus"]["state"] == "done"


def test_a_run_that_has_said_nothing_is_not_started(folder: RunFolder) -> None:
    assert headline(folder) == "not started"


def test_a_folder_without_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run in"):
        stages(RunFolder(tmp_path))


@pytest.mark.slow
def test_a_finished_run_shows_every_stage_as_done(coalesce: Command, finished: Inputs) -> None:
    outcome = coalesce("status", finished.run_dir)
    assert outcome.code == 0
    assert "finished" in outcome.out
    found = stages(RunFolder(finished.run_dir))
    assert {entry["state"] for entry in found.values()} == {"done"}
    assert all(entry["done"] == entry["units"] for entry in found.values())
    assert list(found) == [
        "verify", "corpus", "calibrate", "inputs", "subsample",
        "group", "transform", "export", "report",
    ]  # fmt: skip


def test_status_of_a_run_that_failed_on_the_command_line_names_the_error(
    coalesce: Command, inputs: Inputs
) -> None:
    inputs.change_weights(lambda tensors: tensors["lm_head.weight"][0].fill_(float("nan")))
    assert coalesce("run", inputs.recipe(), "--quiet").code == 2
    outcome = coalesce("status", inputs.run_dir)
    assert outcome.code == 0
    assert "failed: lm_head.weight in" in " ".join(outcome.out.split())


# Progress -----------------------------------------------------------------------------------------


def test_what_a_unit_says_includes_rate_and_time_left() -> None:
    event = {
        "event": "unit_done", "stage": "calibrate", "done": 2, "units": 8,
        "amount": 5000, "of": "tokens", "elapsed_seconds": 2.0, "eta_seconds": 6.0,
    }  # fmt: skip
    assert describe(event) == f"[3/{len(STAGES)}] calibrate: 2/8 2,500 tokens/s, 6 s left"


def test_a_log_file_gets_plain_lines_and_not_one_for_every_unit(
    folder: RunFolder, log: EventLog
) -> None:
    text = io.StringIO()
    with listener(Console(file=text, width=140)) as listen:
        busy = EventLog(folder.events, [listen])
        busy.emit("stage_started", stage="calibrate", units=50)
        for done in range(50):
            busy.emit("unit_done", stage="calibrate", done=done + 1, units=50)
        busy.emit("warning", message="[bold] is not markup")
        busy.emit("stage_done", stage="calibrate", seconds=1.0)
    lines = text.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("warning: [bold] is not markup")
    assert "\x1b" not in text.getvalue()


# What goes wrong ----------------------------------------------------------------------------------


def test_retries_failures_rate_and_slowest_units_are_told(folder: RunFolder, log: EventLog) -> None:
    log.emit("run_started", run="x", resumes=True)
    log.emit("stage_started", stage="calibrate", units=9)
    for index, seconds in enumerate((1.0, 9.0, 2.0, 5.0)):
        log.emit(
            "unit_done", stage="calibrate", unit=f"u{index}", done=index + 1, units=9,
            seconds=seconds, resumed=index == 1, per_second=0.5, eta_seconds=10.0,
        )  # fmt: skip
    for cause in ("lost", "lost", "out_of_memory"):
        log.emit("unit_lost", stage="calibrate", unit="u5", cause=cause, times=1, retried=True)
    log.emit("unit_lost", stage="calibrate", unit="u5", cause="lost", times=4, retried=False)
    log.emit("unit_failed", stage="calibrate", unit="u5", error="lost its worker 4 times")
    log.emit("run_failed", error="lost its worker 4 times", code=75)
    entry = as_json(folder)["stages"]["calibrate"]
    assert entry["retries"] == {"lost": 2, "out_of_memory": 1}
    assert entry["failed"] == {"u5": "lost its worker 4 times"}
    # u1 was found done: its seconds are those of another day.
    assert entry["slowest"] == [("u3", 5.0), ("u2", 2.0), ("u0", 1.0)]
    assert (entry["state"], entry["resumed"], entry["per_second"]) == ("failed", 1, 0.5)
    assert "2 lost, 1 out_of_memory" in " ".join(shown(folder).split())
    assert details(folder)[1] == "slowest of calibrate: u3 5.0 s, u2 2.0 s, u0 1.0 s"


def test_time_left_shrinks_between_two_signs_of_life(folder: RunFolder) -> None:
    now = time.time()
    lines = [
        {"time": now - 20, "event": "stage_started", "stage": "calibrate", "units": 2},
        {"time": now - 10, "event": "unit_done", "stage": "calibrate", "unit": "a",
         "eta_seconds": 30.0},
    ]  # fmt: skip
    folder.events.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"time": 17')
    entry = stages(folder)["calibrate"]
    assert 15 < entry["eta"] <= 20
    assert 20 <= entry["seconds"] < 25
