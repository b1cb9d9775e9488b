"""What Slurm says about the job that this process is in. Standard library only."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

# Space of Ray's object store on every node: units name paths, results are small dictionaries.
OBJECT_STORE_BYTES = 200 << 20
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Allocation:
    """The job: its nodes in Slurm's order, the first of which is this one."""

    job: str
    # How often the job was started again.
    restart: int
    nodes: tuple[str, ...]
    cpus_per_task: int

    @classmethod
    def current(cls) -> Allocation:
        """From the environment of a batch script.

        Raises:
            RuntimeError: this is no batch script of a Slurm job.
        """
        try:
            nodelist, job = os.environ["SLURM_JOB_NODELIST"], os.environ["SLURM_JOB_ID"]
        except KeyError as error:
            raise RuntimeError(f"{error} is not set: this runs inside a Slurm job only") from error
        names = _output("scontrol", "show", "hostnames", nodelist).split()
        cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        return cls(job, int(os.environ.get("SLURM_RESTART_COUNT", "0")), tuple(names), cpus)

    @property
    def name(self) -> str:
        """Of this start of the job; no other start has it."""
        return f"{self.job}-{self.restart}"


def resources(environment: Mapping[str, str]) -> dict[str, int]:
    """What this job may use of this node, in the words of `ray start`.

    Without `memory` Ray takes what the node or its cgroup has; without GPUs it must find none.
    """
    cpus = int(environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE", "1"))
    found = {"num-cpus": cpus, "num-gpus": int(environment.get("SLURM_GPUS_ON_NODE") or 0)}
    mebibytes = int(environment.get("SLURM_MEM_PER_NODE") or 0)
    mebibytes = mebibytes or int(environment.get("SLURM_MEM_PER_CPU") or 0) * cpus
    left = (mebibytes << 20) - OBJECT_STORE_BYTES
    return found | ({"memory": left} if left > 0 else {})


def address_of(node: str, interface: str | None) -> str:
    """IPv4 address of this node: of an interface, or the one by which Slurm reaches it.

    Raises:
        OSError: no such interface, or a name that does not resolve.
    """
    if interface is not None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            wanted = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, wanted)[20:24])
    found = re.search(r"NodeAddr=(\S+)", _output("scontrol", "show", "node", node))
    name = found[1] if found else node
    addresses = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    return str(addresses[0][4][0])


def free_port(address: str) -> int:
    """A port of this node that is free now."""
    return free_ports(address, 1)[0]


def free_ports(address: str, count: int) -> list[int]:
    """Different ports of this node that are free now."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((address, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def state_of(job: str) -> str:
    """Slurm's word for the state of a job: RUNNING, or CANCELLED although it still runs."""
    found = re.search(r"JobState=(\S+)", _output("scontrol", "show", "job", job))
    return found[1] if found else "UNKNOWN"


def _output(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
