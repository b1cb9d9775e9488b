"""Ray's memory monitor ends a worker that really takes too much: the unit is run again."""

from __future__ import annotations

from dataclasses import dataclass
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

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(1800)]
# What else runs on the machine may grow by so much meanwhile.
ROOM, MORE = 6 << 30, 2 << 30


def memory() -> dict[str, int]:
    """Bytes of this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}


@dataclass(frozen=True)
class Monitored:
    """Ray's monitor counts the whole machine: its limit lies above what is used at the moment."""

    env: dict[str, str]
    too_much: int


@pytest.fixture
def monitored() -> Monitored:
    now = memory()
    room = min(ROOM, now["MemAvailable"] // 2)
    if room < MORE:
        pytest.skip(f"needs {2 * MORE >> 30} GiB of free memory")
    share = 1 - (now["MemAvailable"] - room) / now["MemTotal"]
    settings = {"RAY_memory_usage_threshold": f"{share:.4f}"}
    return Monitored(settings | {"RAY_memory_monitor_refresh_ms": "100"}, room + MORE)


def test_workers_ended_for_their_memory_are_replaced(
    every_stage: Inputs,
    short_undisturbed: dict[str, str],
    monitored: Monitored,
    tmp_path: Path,
) -> None:
    """A task and an actor."""
    run_dir, holds = tmp_path / "run", Holds(tmp_path / "holds")
    env = environment(holds.folder, **monitored.env)
    holds.want("task", r"/calibration/\.tokens", allocate=monitored.too_much)
    holds.want("actor", r"/shards/\.shard-00001\.arrow", allocate=monitored.too_much)
    with Driver(every_stage, run_dir, SHORT, env) as driver:
        for name in ("task", "actor"):
            worker = holds.taken(name, driver)
            until(lambda worker=worker: not command_of(worker), "the monitor ends it")
        driver.succeed()
    assert bytes_of(run_dir) == short_undisturbed


def test_a_unit_that_always_takes_too_much_ends_the_run_with_its_budget(
    every_stage: Inputs, monitored: Monitored, tmp_path: Path
) -> None:
    run_dir, holds = tmp_path / "run", Holds(tmp_path / "holds")
    env = environment(holds.folder, **monitored.env)
    for turn in range(4):
        holds.want(f"turn-{turn}", r"/calibration/\.tokens", allocate=monitored.too_much)
    with Driver(every_stage, run_dir, SHORT, env) as driver:
        code, said = driver.end()
    assert code == 75, said
    assert "error: corpus/calibration lost its worker 4 times" in said
    assert "running low on memory" in said
    assert said.endswith("; fewer `executor.workers` need less at a time\n")
    assert not (run_dir / "calibration" / "tokens.arrow.json").exists()
    assert not events(run_dir, "run_done")
