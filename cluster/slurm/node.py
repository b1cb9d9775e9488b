"""Runs on every node of an allocation, started by srun: Ray's head on the first, workers elsewhere.

Stops nothing but the Ray that it started: Slurm jobs may share a node.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from cluster.slurm.allocation import (
    OBJECT_STORE_BYTES,
    address_of,
    free_port,
    free_ports,
    resources,
)
from cluster.slurm.rendezvous import Rendezvous

_ATTEMPTS = 3
_LISTENS_SECONDS = 90.0
_ENDS_SECONDS = 15.0
_AGENT_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


class Node:
    """This node's part of the cluster."""

    def __init__(self, rendezvous: Rendezvous, address: str, scratch: Path, seconds: float) -> None:
        self._rendezvous = rendezvous
        self._address = address
        self._scratch = scratch
        self._seconds = seconds
        self._ray: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Ends Ray on this node; `run_head` and `run_worker` then return."""
        self._stopped = True
        if self._ray is not None:
            self._ray.terminate()

    def run_head(self) -> int:
        """Until the head ends: 0 if it was asked to."""
        for _ in range(_ATTEMPTS):
            port = free_port(self._address)
            self._start("--head", *self._head_options(port))
            if self._listens(port):
                self._rendezvous.announce_head(f"{self._address}:{port}")
                return self._end()
            self._end()  # another process was faster with a port
            if self._stopped:
                return 0
        _say("Ray's head did not start; its messages stand above")
        return 1

    def run_worker(self) -> int:
        """Until the job ends. A worker that is lost joins again; the run goes on without it."""
        head = self._rendezvous.await_head(self._seconds, lambda: self._stopped)
        for _ in range(_ATTEMPTS if head else 0):
            if self._stopped:
                return 0
            self._start(f"--address={head}")
            code = self._end()
            _say(f"Ray ended with code {code}")
        # Not an error: srun would end the other nodes as well.
        _say("this node is out" if head else f"no head after {self._seconds:.0f} s")
        return 0

    def _head_options(self, port: int) -> Sequence[str]:
        # Several heads may run on one node, so none has a port that is always the same.
        client = free_port(self._address)
        own = [f"--port={port}", f"--ray-client-server-port={client}"]
        return [*own, "--include-dashboard=false"]

    def _start(self, *options: str) -> None:
        common = [f"--{name}={value}" for name, value in resources(os.environ).items()]
        common += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={self._scratch}"]
        common += ["--min-worker-port=0", "--max-worker-port=0", *self._agent_options()]
        common += [f"--node-ip-address={self._address}", "--disable-usage-stats", "--block"]
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *common]
        self._ray = subprocess.Popen(words)
        if self._stopped:
            self._ray.terminate()

    def _agent_options(self) -> Sequence[str]:
        # Ports that its agents choose Ray waits for, 15 s, and then ends the node: too short where
        # Python loads from a slow file system. It does not wait for those that it is given.
        ports = free_ports(self._address, len(_AGENT_PORTS))
        return [f"--{name}={port}" for name, port in zip(_AGENT_PORTS, ports, strict=True)]

    def _listens(self, port: int) -> bool:
        assert self._ray is not None
        deadline = time.monotonic() + _LISTENS_SECONDS
        while self._ray.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection((self._address, port), timeout=1):
                return True
            time.sleep(0.1)
        return False

    def _end(self) -> int:
        """Waits for Ray to end; once asked to, no longer than it should take."""
        assert self._ray is not None
        while not self._stopped:
            with suppress(subprocess.TimeoutExpired):
                code = self._ray.wait(timeout=0.2)
                return 0 if self._stopped else code or 1
        try:
            self._ray.wait(timeout=_ENDS_SECONDS)
        except subprocess.TimeoutExpired:
            self._ray.kill()
        return 0


def main() -> int:
    """The exit code is 0 unless the head failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--join-seconds", type=float, required=True)
    parser.add_argument("--interface")
    options = parser.parse_args()
    name, rendezvous = os.environ["SLURMD_NODENAME"], Rendezvous(options.rendezvous)
    address = address_of(name, options.interface)
    scratch = options.scratch / f"{options.rendezvous.name}-{name}"
    node = Node(rendezvous, address, scratch, options.join_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, node.stop)
    try:
        rendezvous.announce_node(name, address)
    except OSError as error:
        _say(f"{error}: this node does not see the run folder")
        return 0
    try:
        if os.environ["SLURM_NODEID"] != "0":
            return node.run_worker()
        rendezvous.announce_step(os.environ["SLURM_STEP_ID"])
        return node.run_head()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _say(text: str) -> None:
    print(f"{os.environ.get('SLURMD_NODENAME')}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
