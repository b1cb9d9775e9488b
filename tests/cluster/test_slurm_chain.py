"""What the launcher does without a cluster: counting progress, resources, naming missing nodes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.slurm.allocation import (
    OBJECT_STORE_BYTES,
    address_of,
    free_port,
    free_ports,
    resources,
)
from cluster.slurm.chain import Chain
from cluster.slurm.rendezvous import Rendezvous
from cluster.slurm.wait import missing


def event(kind: str, **fields: object) -> str:
    return json.dumps({"time": 0, "event": kind, **fields}) + "\n"


def test_only_units_that_were_run_in_this_start_are_progress(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "chain.json", tmp_path / "events.jsonl", "7")
    chain.events.write_text(event("unit_done", resumed=False))
    count = chain.counter()
    assert count() == 0
    with chain.events.open("a") as file:
        file.write(event("unit_done", resumed=True) + event("stage_done") + "{cut off\n")
        file.write(event("unit_done", stage="report"))
    assert count() == 0
    with chain.events.open("a") as file:
        file.write(event("unit_done", resumed=False) * 3)
    assert count() == 3


def test_fruitless_starts_in_a_row_are_counted_per_job(tmp_path: Path) -> None:
    def chain(job: str) -> Chain:
        return Chain(tmp_path / "chain.json", tmp_path / "events.jsonl", job)

    assert [chain("7").end_start(progress) for progress in (0, 0, 4, 0, 0, 0)] == [1, 2, 0, 1, 2, 3]
    assert chain("8").fruitless_so_far() == 0
    chain("7").path.write_text("damaged")
    assert chain("7").end_start(0) == 1


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"SLURM_CPUS_PER_TASK": "8"}, {"num-cpus": 8, "num-gpus": 0}),
        ({"SLURM_CPUS_ON_NODE": "4", "SLURM_GPUS_ON_NODE": "2"}, {"num-cpus": 4, "num-gpus": 2}),
        (
            {"SLURM_CPUS_PER_TASK": "2", "SLURM_MEM_PER_NODE": "3000"},
            {"num-cpus": 2, "num-gpus": 0, "memory": (3000 << 20) - OBJECT_STORE_BYTES},
        ),
        (
            {"SLURM_CPUS_PER_TASK": "2", "SLURM_MEM_PER_CPU": "1000"},
            {"num-cpus": 2, "num-gpus": 0, "memory": (2000 << 20) - OBJECT_STORE_BYTES},
        ),
        ({"SLURM_MEM_PER_NODE": "100"}, {"num-cpus": 1, "num-gpus": 0}),
    ],
)
def test_ray_gets_what_slurm_gave(environment: dict[str, str], wanted: dict[str, int]) -> None:
    assert resources(environment) == wanted


def test_an_interface_has_an_address_and_free_ports() -> None:
    address = address_of("nobody", "lo")
    assert address == "127.0.0.1"
    with socket.socket() as taken:
        taken.bind((address, free_port(address)))
    assert len(set(free_ports(address, 50))) == 50
    with pytest.raises(OSError, match="No such device"):
        address_of("nobody", "nope0")


def test_missing_nodes_are_named_with_how_far_they_got(tmp_path: Path) -> None:
    rendezvous = Rendezvous(tmp_path)
    assert rendezvous.await_head(0, lambda: False) is None
    rendezvous.announce_node("n3", "10.0.0.3")
    rendezvous.announce_head("10.0.0.1:6379")
    assert rendezvous.await_head(0, lambda: False) == "10.0.0.1:6379"
    assert missing(["n2", "n3"], rendezvous, 4, 600) == (
        "2 of 4 nodes missing after 600 s: n2 did not report at all (not started, or the run folder"
        " is not shared with it); n3 started but could not join (firewall between the nodes, or"
        " another version of Ray)"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "node-n3"]


def test_the_launcher_needs_a_slurm_job_and_says_so_without_loading_ray() -> None:
    code = (
        "import sys; from cluster.slurm.launch import main\n"
        "sys.argv = 'launch --run r --python p --scratch /tmp --join-seconds 1 --lead-seconds 9"
        " --fruitless-starts 1 -- true'.split()\n"
        "try: main()\nexcept RuntimeError as error: print(error, 'ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (
        "'SLURM_JOB_NODELIST' is not set: this runs inside a Slurm job only False"
    )


@pytest.mark.parametrize("word", ["pickle", "cloudpickle", "torch.load", "marshal", "shelve"])
def test_nothing_in_the_product_unpickles_files(word: str) -> None:
    repository = Path(__file__).resolve().parents[2]
    packages = ("orchestrator", "stages", "cluster", "models")
    modules = [path for each in packages for path in (repository / each).rglob("*.py")]
    users = [path.name for path in modules if f"import {word}" in path.read_text()]
    users += [path.name for path in modules if f"{word}(" in path.read_text()]
    assert not users


STUBBORN = """
import argparse, os, signal, subprocess, sys
from pathlib import Path
from cluster.slurm.allocation import Allocation
from cluster.slurm.launch import Launch

options = argparse.Namespace(run=Path(sys.argv[1]), python=sys.executable, lead_seconds=2)
launch = Launch(options, Allocation("7", 0, ("n1",), 1))
for number in (signal.SIGUSR1, signal.SIGALRM):
    signal.signal(number, launch._pass_on)
step = subprocess.Popen(["sleep", "60"])
ignores = "import os, signal, time\\nfor n in (10, 15): signal.signal(n, signal.SIG_IGN)\\n"
ignores += "os.kill(os.getppid(), signal.SIGUSR1); time.sleep(60)"
code = launch._watch([sys.executable, "-c", ignores], step, os.environ)
print(code, launch._verdict(code), launch._in_time(20) < 2)
step.kill()
"""


def test_a_driver_that_does_not_end_is_killed_before_the_time_limit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUBBORN, tmp_path], capture_output=True, text=True, check=True
    )
    said = [line.split("coalesce: ")[-1] for line in done.stdout.splitlines()]
    assert said == [
        "got SIGUSR1",
        "the driver is not done with its last units: ending them",
        "the driver does not end: killing it",
        "-9 75 True",
    ]
