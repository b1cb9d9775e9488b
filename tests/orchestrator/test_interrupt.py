"""A run that is asked to stop says how to go on, and goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.executor import Job
from cluster.local import LocalExecutor
from orchestrator.events import read_events
from orchestrator.interrupt import Interrupted, heeding_signals, stopping_at_once
from orchestrator.status import headline, of
from tests.orchestrator.tiny_run import Command, Inputs


def test_a_drained_executor_ends_the_unit_in_hand_and_takes_no_other() -> None:
    started: list[int] = []

    def run(unit: int) -> int:
        started.append(unit)
        if unit == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return unit

    with heeding_signals() as stop, LocalExecutor(threads=1) as executor:
        results = dict(executor.imap(Job(lambda: run), range(5), stop))
        assert results == {0: 0, 1: 1}
        with pytest.raises(Interrupted) as caught:
            stop.check()
    assert started == [0, 1]
    assert caught.value.exit_code == 75


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_other_signals_end_the_unit_in_hand(number: signal.Signals, code: int) -> None:
    with heeding_signals(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert caught.value.exit_code == code


def test_an_error_that_a_library_makes_of_the_interruption_is_not_taken_for_the_cause() -> None:
    with heeding_signals(), pytest.raises(Interrupted) as caught, heeding_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Interrupted as interrupted:
            raise SystemError("returned a result with an exception set") from interrupted
    assert caught.value.exit_code == 143


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with stopping_at_once(), heeding_signals():
        pass
    after = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert after == before


def start(recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(recipe), "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def signal_when(process: subprocess.Popen[str], folder: Path, pattern: str, number: int) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.005)
    os.kill(process.pid, number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [
        ("local", signal.SIGINT, 130),
        ("local", signal.SIGUSR1, 75),
        ("ray", signal.SIGTERM, 143),
        ("ray", signal.SIGUSR1, 75),
    ],
)
def test_an_interrupted_run_prints_one_line_and_goes_on(
    coalesce: Command, inputs: Inputs, kind: str, number: signal.Signals, code: int
) -> None:
    recipe = inputs.recipe(executor__kind=kind, calibrate__shards=16)
    process = start(recipe)
    signal_when(process, inputs.run_dir, "calibration/shards/*.json", number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert err == (
        f"stopped by {number.name}; finished units are kept; the same command goes on:"
        f" coalesce run {recipe} --quiet\n"
    )
    assert out == ""
    # On Ray the driver leaves and its workers are killed, perhaps while one writes.
    assert kind == "ray" or not list(inputs.run_dir.rglob("*.tmp"))
    assert f"stopped by {number.name}" in headline(of(inputs.run_dir))
    finished = list(inputs.run_dir.glob("calibration/shards/*.json"))
    assert len(finished) < 16
    assert coalesce("run", inputs.recipe(calibrate__shards=16), "--quiet").code == 0
    assert not list(inputs.run_dir.rglob("*.tmp"))
    events = list(read_events(inputs.run_dir / "events.jsonl"))
    kept = [e for e in events if e["event"] == "resuming" and e["stage"] == "calibrate"]
    assert [event["done"] for event in kept] == [len(finished)]


@pytest.mark.slow
def test_a_signal_right_after_ray_has_started_is_no_exit_of_rays_own() -> None:
    """Ray's own handler stands between `ray.init` and `heeding_signals`."""
    from cluster.ray import RayExecutor

    with pytest.raises(Interrupted) as caught, stopping_at_once(), RayExecutor(workers=1):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.exit_code == 143
