"""Runs as the batch script of a Slurm job: forms a Ray cluster, runs the driver once, ends both.

The exit code is the driver's. SIGUSR1 (the time limit is near) is passed on to the driver, which
takes no more units; whatever it leaves unfinished by the deadline is ended, and the job requeues
itself. SIGTERM (cancelled, or preempted) ends the driver at once: whether the job comes back is
then Slurm's to decide. Standard library only; Ray runs in other processes.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from cluster.slurm.allocation import Allocation, state_of
from cluster.slurm.chain import Chain
from cluster.slurm.rendezvous import Rendezvous

EXIT_AGAIN = 75
# Of the lead time, what is kept for ending driver and cluster and for requeueing; half at most.
_RESERVE_SECONDS = 20.0
_ENDS_SECONDS = 20.0
_REQUEUES_SECONDS = 5.0
# Found out by cutting nodes off: with Ray's defaults a task on a silent node waits for minutes.
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ends at once; nothing here waits for a node to be emptied.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_health_check_period_ms": "5000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    # Of a node's agents; half a minute is too short where Python loads from a slow file system.
    "RAY_agent_register_timeout_ms": "120000",
}


class ClusterLost(Exception):
    """The head's node or process is gone, or nodes are missing."""


class Launch:
    """One start of one job."""

    def __init__(self, options: argparse.Namespace, job: Allocation) -> None:
        self._options = options
        self._job = job
        self._rendezvous = Rendezvous(options.run / "slurm" / f"coalesce-{job.name}")
        self._python = shlex.split(options.python)
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: set[int] = set()
        # When the time limit comes at the earliest, once Slurm has warned of it; and whether the
        # driver was told to end before it.
        self._limit: float | None = None
        self._overdue = False

    def run(self) -> int:
        """The driver's exit code, or 75 when the job should be started again."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self._pass_on)
        os.environ |= {name: os.environ.get(name, value) for name, value in _RAY.items()}
        # Known to the processes of this job alone: in their environment, in no file.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        try:
            with self._cluster() as step:
                address = self._await_nodes(step)
                say(f"driver: {shlex.join(self._options.driver)}")
                environment = {**os.environ, "RAY_ADDRESS": address}
                code = self._watch(self._options.driver, step, environment)
        except ClusterLost as lost:
            say(str(lost))
            code = EXIT_AGAIN
        return self._verdict(code)

    def _verdict(self, code: int) -> int:
        """The job's exit code; 75 asks for another start."""
        if code in (0, 1, 2):
            return code
        if signal.SIGTERM in self._asked or signal.SIGINT in self._asked:
            say("ended by Slurm; finished units are kept")
            return 128 + signal.SIGTERM
        # 75, or killed: by the deadline, or for want of memory.
        return EXIT_AGAIN if code in (EXIT_AGAIN, 128 + signal.SIGTERM) or code < 0 else code

    @contextmanager
    def _cluster(self) -> Iterator[subprocess.Popen[bytes]]:
        """The srun step that holds Ray on all nodes; ended with everything in it."""
        self._rendezvous.folder.mkdir(parents=True, exist_ok=True)
        log = self._options.run / "slurm" / f"nodes-{self._job.job}.log"
        say(f"{len(self._job.nodes)} nodes: {', '.join(self._job.nodes)}; their messages: {log}")
        with log.open("ab") as file:
            step = subprocess.Popen(
                self._srun(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            yield step
        finally:
            self._end_step(step)
            shutil.rmtree(self._rendezvous.folder, ignore_errors=True)

    def _end_step(self, step: subprocess.Popen[bytes]) -> None:
        """Lets the nodes end their Ray; srun, asked itself, would kill them before they can."""
        number = self._rendezvous.step()
        if number is not None and step.poll() is None:
            words = ["scancel", "--signal=TERM", f"{self._job.job}.{number}"]
            subprocess.run(words, capture_output=True, check=False)
            with suppress(subprocess.TimeoutExpired):
                step.wait(timeout=self._in_time(_ENDS_SECONDS))
        _end(step, self._in_time(_ENDS_SECONDS))

    def _in_time(self, seconds: float) -> float:
        """As long, but so that the job can still requeue itself; Slurm then ends what is left."""
        if self._limit is None:
            return seconds
        return min(seconds, max(self._limit - time.monotonic() - _REQUEUES_SECONDS, 0.0))

    def _srun(self) -> list[str]:
        nodes = str(len(self._job.nodes))
        words = ["srun", "--overlap", "--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node=1"]
        words += [f"--cpus-per-task={self._job.cpus_per_task}", "--cpu-bind=none"]
        # The step ends with its head, and with nothing less.
        words += ["--kill-on-bad-exit=1", "--wait=0", "--label", *self._python]
        words += ["-m", "cluster.slurm.node", *self._where(), "--scratch", self._options.scratch]
        words += ["--join-seconds", str(self._options.join_seconds)]
        return words + (["--interface", self._options.interface] if self._options.interface else [])

    def _where(self) -> list[str]:
        return ["--rendezvous", str(self._rendezvous.folder)]

    def _await_nodes(self, step: subprocess.Popen[bytes]) -> str:
        """Address of the complete cluster."""
        seconds, start = float(self._options.join_seconds), time.monotonic()
        address = self._rendezvous.await_head(
            seconds, lambda: step.poll() is not None or bool(self._asked)
        )
        if address is None and self._asked:
            raise ClusterLost("asked to stop before the cluster was complete")
        if address is None:
            raise ClusterLost(f"no Ray head on {self._job.nodes[0]} within {seconds:.0f} s")
        left = max(seconds - (time.monotonic() - start), 1)
        wait = [*self._python, "-m", "cluster.slurm.wait", *self._where(), "--address", address]
        if self._watch([*wait, "--seconds", f"{left:.0f}", *self._job.nodes], step, os.environ):
            raise ClusterLost("the cluster is not complete")
        say(f"all nodes joined after {time.monotonic() - start:.0f} s")
        return address

    def _watch(
        self, words: Sequence[str], step: subprocess.Popen[bytes], environment: Mapping[str, str]
    ) -> int:
        """Exit code of a child while the cluster is up."""
        if self._asked:
            return EXIT_AGAIN
        self._child = child = subprocess.Popen(words, env=environment)
        for number in self._asked:  # came while the child was being made
            child.send_signal(number)
        while child.poll() is None:
            time.sleep(0.1)
            if step.poll() is not None and child.poll() is None:
                _end(child, _ENDS_SECONDS)
                raise ClusterLost("Ray ended on the nodes: preempted, cancelled, or its head lost")
        return int(child.returncode)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Slurm's signals go to the driver; the deadline follows the warning."""
        if number == signal.SIGALRM:
            self._end_driver()
            return
        say(f"got {signal.Signals(number).name}")
        self._asked.add(number)
        if number == signal.SIGUSR1:
            lead = self._options.lead_seconds
            self._limit = time.monotonic() + lead
            signal.setitimer(signal.ITIMER_REAL, max(lead - _RESERVE_SECONDS, lead / 2))
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _end_driver(self) -> None:
        """The deadline: asks, and kills if half of what is left of the time goes by."""
        if self._child is None or self._child.poll() is not None or self._limit is None:
            return
        if self._overdue:
            say("the driver does not end: killing it")
            self._child.kill()
            return
        say("the driver is not done with its last units: ending them")
        self._overdue = True
        self._child.terminate()
        left = (self._limit - time.monotonic()) / 2
        signal.setitimer(signal.ITIMER_REAL, max(left, 1.0))


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Asks, waits, kills."""
    process.terminate()
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def requeue(chain: Chain, finished: int, allowed: int) -> None:
    """Starts this job again, unless starts like this one lead nowhere."""
    fruitless = chain.end_start(finished)
    if fruitless >= allowed:
        say(
            f"{fruitless} starts in a row finished no unit: not requeued. Raise slurm.time, or"
            " look for the broken node; then submit again: finished units are kept"
        )
        return
    if (state := state_of(chain.job)) != "RUNNING":
        say(f"the job is {state.lower()}: not requeued; finished units are kept")
        return
    say(f"{finished} units finished in this start; requeueing")
    done = subprocess.run(
        ["scontrol", "requeue", chain.job], capture_output=True, text=True, check=False
    )
    if done.returncode:
        say(f"cannot requeue ({done.stderr.strip()}): submit again, finished units are kept")
        return
    time.sleep(60)  # Slurm ends this process


def main() -> int:
    """One start of the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--python", required=True, help="words that start Python on a node")
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--join-seconds", type=int, required=True)
    parser.add_argument("--lead-seconds", type=int, required=True)
    parser.add_argument("--fruitless-starts", type=int, required=True)
    parser.add_argument("--interface")
    parser.add_argument("driver", nargs="+")
    options = parser.parse_args()
    job = Allocation.current()
    chain = Chain(options.run / "slurm" / "chain.json", options.run / "events.jsonl", job.job)
    finished = chain.counter()
    code = Launch(options, job).run()
    if code == EXIT_AGAIN:
        requeue(chain, finished(), options.fruitless_starts)
    return code


def say(text: str) -> None:
    """A line of the launcher in the job's log."""
    print(f"[{time.strftime('%H:%M:%S')}] coalesce: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
