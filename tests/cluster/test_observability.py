"""What can be seen of units on a real Ray: logs, events, metrics; and how flat its memory stays."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.executor import Job
from cluster.ray import RayExecutor
from orchestrator.events import EventLog, read_events
from orchestrator.run_folder import RunFolder
from orchestrator.scheduler import Scheduler
from orchestrator.status import stages
from stages.unit import Fingerprint, OneFile

pytestmark = pytest.mark.slow
UNITS, SETTLED = 10_000, 2_000


@dataclass(frozen=True)
class Part(OneFile):
    """Writes a file; the second one kills its process at the first attempt."""

    index: int
    output: Path

    @property
    def name(self) -> str:
        return f"calibrate/part-{self.index}"

    @property
    def fingerprint(self) -> Fingerprint:
        return {"code": "part-1"}


@dataclass(frozen=True)
class Tiny:
    """A unit without files."""

    index: int

    @property
    def name(self) -> str:
        return f"tiny-{self.index}"


def write(unit: Part) -> dict[str, Any]:
    print(f"this is part {unit.index}", flush=True)
    tried = unit.output.with_suffix(".tried")
    if unit.index == 1 and not tried.exists():
        tried.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    unit.output.write_text("x")
    return {"tokens": 10}


def make_small() -> Callable[[Tiny], dict[str, int]]:
    return lambda unit: {"index": unit.index}


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    with RayExecutor(workers=2) as started:
        yield started


def exported(wanted: dict[str, float]) -> dict[str, float]:
    """Ray's own metrics endpoint, asked until it shows what is wanted; it is some 10 s late."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 90
    while True:
        with urllib.request.urlopen(address, timeout=10) as answer:
            found = parsed(answer.read().decode())
        if wanted.items() <= found.items() or time.monotonic() > deadline:
            return found
        time.sleep(1)


def parsed(text: str) -> dict[str, float]:
    """Name and labels of ours -> value."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("ray_coalesce_"):
            labels = re.findall(r'(?<![a-zA-Z])(?:stage|cause)="(\w+)"', line)
            name = line.split("{")[0].removesuffix("_total")
            found[f"{name}{labels}"] = float(line.rsplit(" ", 1)[1])
    return found


@pytest.mark.fault
def test_a_lost_worker_shows_in_events_status_log_and_metrics(
    executor: RayExecutor, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    folder = RunFolder(tmp_path)
    events = EventLog(folder.events, [executor.heed])
    scheduler = Scheduler(executor, events, 0, logs=folder.logs)
    scheduler.run("calibrate", [Part(i, tmp_path / f"part-{i}") for i in range(4)], write, 0)

    (lost,) = (each for each in read_events(folder.events) if each["event"] == "unit_lost")
    assert (lost["unit"], lost["cause"], lost["retried"]) == ("calibrate/part-1", "lost", True)
    assert stages(folder)["calibrate"]["retries"] == {"lost": 1}

    text = (folder.logs / "calibrate" / "part-1.log").read_text()
    assert text.count("=== attempt ") == text.count("this is part 1") == 2
    assert text.count("--- worker lost: ") == text.count("--- done after ") == 1
    assert "this is part 0" in (folder.logs / "calibrate" / "part-0.log").read_text()

    wanted = {
        "ray_coalesce_units_done['calibrate']": 4.0,
        "ray_coalesce_unit_seconds_count['calibrate']": 4.0,
        "ray_coalesce_tokens[]": 40.0,
        "ray_coalesce_retries['lost']": 1.0,
    }
    metrics = exported(wanted)
    assert {name: metrics.get(name) for name in wanted} == wanted
    assert "ray_coalesce_units_in_flight[]" in metrics


def resident() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stored() -> float:
    """Bytes in the object store; the node reports them about once a second."""
    import ray

    time.sleep(3)
    name = "object_store_memory"
    return float(ray.cluster_resources()[name] - ray.available_resources().get(name, 0))


def test_ten_thousand_units_leave_the_drivers_memory_and_the_object_store_flat(
    executor: RayExecutor,
) -> None:
    import numpy
    import ray

    kept = ray.put(numpy.zeros(32 << 20, numpy.uint8))
    assert stored() >= 32 << 20, "the measure sees what is put"
    del kept
    units, seen, before = [Tiny(index) for index in range(UNITS)], 0, 0
    for index, result in executor.imap(Job(make_small), units):
        assert result == {"index": index}
        seen += 1
        if seen == SETTLED:
            before = resident()
    grown = resident() - before
    held = stored()
    print(f"driver grew by {grown >> 10} KiB, the object store holds {held:.0f} bytes")
    assert seen == UNITS
    assert grown < 16 << 20
    assert held < 1 << 20
