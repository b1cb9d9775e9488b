"""A real Slurm of a few nodes on this machine, and what tests do with it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
# Set by make. "required": a lab that does not come up fails; "optional": it is skipped where it
# cannot be had. Both may install packages; without either nothing is installed.
WANTED = os.environ.get("COALESCE_SLURM_LAB", "")
# Nothing is expected to take so long; a machine may be busy with other things.
PATIENCE = 900.0
_NOT_POSSIBLE = 3


@dataclass(frozen=True)
class Lab:
    """A running Slurm; `ctl` is its login node."""

    folder: Path

    def on(self, node: str, *words: object, check: bool = True, **variables: str) -> str:
        """Output of a command on a node, with more variables in its environment."""
        done = subprocess.run(
            [self.folder / "on", node, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
            env=os.environ | variables,
        )
        assert not check or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @contextmanager
    def running(self, node: str, *words: object) -> Iterator[None]:
        """A command on a node, ended with the context (and, whatever happens, with the lab)."""
        command = [self.folder / "on", node, "setpriv", "--pdeathsig=KILL", *map(str, words)]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def address(self, node: str) -> str:
        """By which other nodes reach it."""
        return self.on(node, "hostname", "--all-ip-addresses").split()[0]

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

    def submit_by_command(self, run_dir: Path, *overrides: str, **secrets: str) -> str:
        """Submits the small run as a user does; returns the job's number."""
        words = ["submit", "slurm", "quickstart", f"run_dir={run_dir}", *SMALL, *JOB, *overrides]
        done = self.coalesce(*words, **secrets)
        assert done.returncode == 0, done.stderr
        found = re.match(r"submitted: job (\d+), ", done.stdout)
        assert found, done.stdout
        return found[1]

    def submit(self, run_dir: Path, *overrides: str, **environment: str) -> str:
        """The same by what that command calls, in this process, which has imported all of it.

        Args:
            environment: more variables, which the job inherits.
        """
        from orchestrator.load import load
        from orchestrator.preflight import prepare
        from orchestrator.slurm.submit import plan

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(REPOSITORY)
            patch.setenv("PYTHONPATH", str(REPOSITORY))
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("PATH", f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
            for name, value in environment.items():
                patch.setenv(name, value)
            config = load("quickstart", [f"run_dir={run_dir}", *SMALL, *JOB, *overrides]).config
            submission = plan(config)
            prepare(config)
            submission.write()
            return submission.submit()

    def state(self, job: str) -> str:
        """Slurm's word for the state of a job, how often it was started again, and exit code."""
        text = self.on("ctl", "scontrol", "show", "job", job)
        return " ".join(re.findall(r"(?:JobState|Restarts|ExitCode)=(\S+)", text))

    def seconds(self, job: str) -> int:
        """How long this start of a job has been running."""
        text = self.on("ctl", "scontrol", "show", "job", job)
        found = re.search(r"RunTime=(\d+):(\d+):(\d+)", text)
        assert found, text
        hours, minutes, seconds = map(int, found.groups())
        return 3600 * hours + 60 * minutes + seconds

    def await_state(self, job: str, wanted: str, seconds: float = PATIENCE) -> None:
        """Waits until the state of a job matches a pattern."""
        until(
            lambda: re.search(wanted, self.state(job)),
            f"job {job} is {wanted}",
            seconds,
            pause=0.3,
            shown=lambda: self.story(job),
        )

    def story(self, job: str) -> str:
        """All that Slurm and the job itself tell about it."""
        text = self.on("ctl", "scontrol", "show", "job", job)
        log = re.search(r"^\s*StdOut=(.*)$", text, re.MULTILINE)
        return text + (Path(log[1]).read_text() if log and Path(log[1]).exists() else "no log")

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


# Calibration takes some seconds, so that a test can stop it in its midst; all else little.
SMALL = (
    "calibrate.sample.tokens=1024",
    "refit.polish.steps=0",
    "evaluate=null",
    "calibrate.shards=40",
    "calibrate.batch_size=1",
)
JOB = (
    "slurm.nodes=2",
    "slurm.cpus_per_task=1",
    "slurm.memory_per_node=3000M",
    "slurm.join_seconds=300",
    "slurm.lead_seconds=10",
)


def until(
    condition: Callable[[], object],
    what: str,
    seconds: float = PATIENCE,
    *,
    pause: float = 0.02,
    shown: Callable[[], str] = str,
) -> None:
    """Waits for a condition.

    Args:
        pause: seconds between two looks; a look that starts a process should not be taken often.
        shown: what a failure tells besides.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        late = time.monotonic() > deadline
        assert not late, f"not within {seconds:.0f} s: {what}\n{shown()}"
        time.sleep(pause)


def logs_of(run_dir: Path) -> str:
    """All that the jobs of a run printed."""
    return "\n".join(path.read_text() for path in sorted((run_dir / "slurm").glob("*.log")))


def bring_up(folder: Path) -> Lab:
    """Starts Slurm, or skips the test and says why."""
    environment = os.environ | {"LAB_GPUS": "2", "LAB_INSTALL": "1" if WANTED else "0"}
    up = subprocess.run(
        [HERE / "up.sh", folder, "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if up.returncode == _NOT_POSSIBLE and WANTED != "required":
        pytest.skip(f"no Slurm here: {up.stderr.strip()}")
    assert up.returncode == 0, up.stdout + up.stderr
    return Lab(folder)


def take_down(folder: Path) -> None:
    """Ends what was started."""
    subprocess.run([HERE / "down.sh", folder], check=False)
    shutil.rmtree(folder, ignore_errors=True)
