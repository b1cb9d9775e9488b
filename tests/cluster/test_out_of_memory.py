"""Ray's memory monitor ends a worker for real; the unit's budget for that is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.fault]
# In a process of its own: the threshold is read when Ray starts, and counts the whole machine.
SCRIPT = """
import json, os, time
from dataclasses import dataclass
from cluster.errors import InfrastructureError
from cluster.executor import Job

facts = dict(line.split(":") for line in open("/proc/meminfo"))
total, free = (int(facts[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
os.environ["RAY_memory_usage_threshold"] = str((total - free + (3 << 30)) / total)
os.environ["RAY_memory_monitor_refresh_ms"] = "100"
from cluster.ray import RayExecutor

@dataclass(frozen=True)
class Hungry:
    name: str

def hog(unit):
    eaten = []
    for _ in range(100):
        eaten.append(b"x" * (100 << 20))
        time.sleep(0.05)

def make():
    return hog

told = []
with RayExecutor(workers=1, max_retries=5, memory_retries=1) as executor:
    try:
        list(executor.imap(Job(make, stateful=True), [Hungry("hog")], heed=told.append))
    except InfrastructureError as error:
        causes = [(lost.cause, lost.times, lost.retried) for lost in told]
        print(json.dumps({"told": causes, "error": str(error)}))
"""


def test_a_worker_that_the_memory_monitor_ends_is_tried_once_more_and_no_further() -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 6 << 30:
        pytest.skip(
            f"needs 6 GiB of free memory to exceed a threshold safely, {free >> 30} GiB are"
        )
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=250
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["told"] == [["out_of_memory", 1, True], ["out_of_memory", 2, False]]
    assert found["error"].startswith("hog ran out of memory 2 times: ")
    # Ray lists processes with their command lines, which may hold secrets.
    assert "PID" not in found["error"]
