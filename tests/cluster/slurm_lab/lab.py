"""A real Slurm of a few nodes on this machine, and what tests do with it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
# Set by `make test-cluster`: packages may be installed, and a lab that does not come up fails.
REQUIRED = os.environ.get("COALESCE_SLURM_LAB") == "required"
_NOT_POSSIBLE = 3


@dataclass(frozen=True)
class Lab:
    """A running Slurm; `ctl` is its login node."""

    folder: Path

    def on(self, node: str, *words: object, check: bool = True) -> str:
        """Output of a command on a node."""
        done = subprocess.run(
            [self.folder / "on", node, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
        )
        assert not check or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def coalesce(self, *words: object, **secrets: str) -> subprocess.CompletedProcess[str]:
        """The command on the login node, with more variables in its environment."""
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [self.folder / "on", "ctl", sys.executable, "-m", "orchestrator", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
            env=environment | secrets,
        )

    def submit(self, run_dir: Path, *overrides: str, **secrets: str) -> str:
        """Submits the small run; returns the job's number."""
        words = ["submit", "slurm", "quickstart", f"run_dir={run_dir}", *SMALL, *JOB, *overrides]
        done = self.coalesce(*words, **secrets)
        assert done.returncode == 0, done.stderr
        found = re.match(r"submitted: job (\d+), ", done.stdout)
        assert found, done.stdout
        return found[1]

    def state(self, job: str) -> str:
        """Slurm's word for the state of a job, and how often it was started again."""
        text = self.on("ctl", "scontrol", "show", "job", job)
        return " ".join(re.findall(r"(?:JobState|Restarts|ExitCode)=(\S+)", text))

    def await_state(self, job: str, wanted: str, seconds: float = 240) -> None:
        """Waits until the state of a job matches a pattern."""
        until(lambda: re.search(wanted, self.state(job)), f"job {job} is {wanted}", seconds)

    def await_end(self, job: str) -> str:
        """State in the end, restarts, exit code."""
        self.await_state(job, r"COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL")
        return self.state(job)

    def workers(self, node: str) -> list[int]:
        """Processes on a node that run units, by their ids there."""
        return [
            int(word) for word in self.on(node, "pgrep", "-f", "^ray::_Wor", check=False).split()
        ]

    def signal_workers(self, number: signal.Signals) -> int:
        """To all processes that run units; returns how many there are."""
        found = {node: self.workers(node) for node in ("n1", "n2")}
        for node, processes in found.items():
            if processes:
                self.on(node, "kill", f"-{number.name}", *processes, check=False)
        return sum(map(len, found.values()))

    def end_head(self) -> int:
        """Kills Ray's head process on the first node; returns how many there were."""
        found = self.on("n1", "pgrep", "-x", "gcs_server", check=False).split()
        if found:
            self.on("n1", "kill", "-KILL", *found)
        return len(found)


# Calibration takes some seconds, so that a test can stop it in its midst.
SMALL = (
    "evaluate=null",
    "calibrate.shards=40",
    "calibrate.batch_size=1",
)
JOB = (
    "slurm.nodes=2",
    "slurm.cpus_per_task=1",
    "slurm.memory_per_node=3000M",
    "slurm.join_seconds=120",
    "slurm.lead_seconds=10",
)


def until(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)


def logs_of(run_dir: Path) -> str:
    """All that the jobs of a run printed."""
    return "\n".join(path.read_text() for path in sorted((run_dir / "slurm").glob("*.log")))


def bring_up(folder: Path) -> Lab:
    """Starts Slurm, or skips the test and says why."""
    environment = os.environ | {"LAB_GPUS": "2", "LAB_INSTALL": "1" if REQUIRED else "0"}
    up = subprocess.run(
        [HERE / "up.sh", folder, "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if up.returncode == _NOT_POSSIBLE and not REQUIRED:
        pytest.skip(f"no Slurm here: {up.stderr.strip()}")
    assert up.returncode == 0, up.stdout + up.stderr
    return Lab(folder)


def take_down(folder: Path) -> None:
    """Ends what was started."""
    subprocess.run([HERE / "down.sh", folder], check=False)
    shutil.rmtree(folder, ignore_errors=True)
