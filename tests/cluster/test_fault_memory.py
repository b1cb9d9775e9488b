"""Ray's memory monitor ends a worker that really takes too much: the unit is run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.faults import (
    SHORT,
    Driver,
    Holds,
    bytes_of,
    command_of,
    environment,
    events,
    until,
)
from tests.orchestrator.tiny_run import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOM, BALLAST = 2 << 30, 4 << 30


def memory() -> dict[str, int]:
    """Bytes of this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}


@pytest.fixture
def monitored() -> dict[str, str]:
    """Ray's monitor counts the whole machine: its limit lies above what is used at the moment."""
    now = memory()
    if now["MemAvailable"] < BALLAST + ROOM:
        pytest.skip(f"needs {(BALLAST + ROOM) >> 30} GiB of free memory")
    used = now["MemTotal"] - now["MemAvailable"]
    share = (used + ROOM) / now["MemTotal"]
    return {"RAY_memory_usage_threshold": f"{share:.4f}", "RAY_memory_monitor_refresh_ms": "100"}


def test_workers_ended_for_their_memory_are_replaced(
    every_stage: Inputs,
    short_undisturbed: dict[str, str],
    monitored: dict[str, str],
    tmp_path: Path,
) -> None:
    """A task and an actor."""
    run_dir, holds = tmp_path / "run", Holds(tmp_path / "holds")
    env = environment(holds.folder, **monitored)
    holds.want("task", r"/calibration/\.tokens", allocate=BALLAST)
    holds.want("actor", r"/shards/\.shard-00001\.arrow", allocate=BALLAST)
    with Driver(every_stage, run_dir, SHORT, env) as driver:
        for name in ("task", "actor"):
            worker = holds.taken(name, driver)
            until(lambda worker=worker: not command_of(worker), "the monitor ends it")
        driver.succeed()
    assert bytes_of(run_dir) == short_undisturbed


def test_a_unit_that_always_takes_too_much_ends_the_run_with_its_budget(
    every_stage: Inputs, monitored: dict[str, str], tmp_path: Path
) -> None:
    run_dir, holds = tmp_path / "run", Holds(tmp_path / "holds")
    env = environment(holds.folder, **monitored)
    for turn in range(4):
        holds.want(f"turn-{turn}", r"/calibration/\.tokens", allocate=BALLAST)
    with Driver(every_stage, run_dir, SHORT, env) as driver:
        code, said = driver.end()
    assert code == 75, said
    assert "error: corpus/calibration lost its worker 4 times" in said
    assert "memory" in said
    assert not (run_dir / "calibration" / "tokens.arrow.json").exists()
    assert not events(run_dir, "run_done")
