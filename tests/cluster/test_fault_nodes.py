"""Nodes of a Ray cluster are lost, cut off and found again; the head is lost: the same bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.faults import (
    SHORT,
    Driver,
    Holds,
    Node,
    bytes_of,
    command_of,
    environment,
    events,
    free_port,
    nodes_up,
    until,
)
from tests.orchestrator.tiny_run import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(1800)]
# What the Slurm launcher sets too, but quicker: a dead node is to be noticed within the test.
QUICK = {
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}


def test_with_the_raylet_of_one_of_two_nodes_killed_the_other_goes_on(
    every_stage: Inputs, short_undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir, holds = tmp_path / "run", Holds(tmp_path / "holds")
    address, holding = f"127.0.0.11:{free_port()}", environment(holds.folder, **QUICK)
    with (
        Node(address, "127.0.0.11", head=True, env=environment(**QUICK)),
        Node(address, "127.0.0.12", env=holding) as second,
    ):
        until(lambda: nodes_up(address) == 2, "two nodes")
        holds.want("shard", r"/shards/\.shard")
        words = (*SHORT, f"executor.address={address}", "executor.workers=2")
        with Driver(every_stage, run_dir, words, environment(**QUICK)) as driver:
            worker = holds.taken("shard", driver)
            second.kill("raylet")
            driver.succeed()
        assert not command_of(worker)
    assert bytes_of(run_dir) == short_undisturbed


def test_with_the_head_killed_the_driver_says_so_and_a_new_cluster_goes_on(
    every_stage: Inputs, short_undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir, holds = tmp_path / "run", Holds(tmp_path / "holds")
    address, env = f"127.0.0.13:{free_port()}", environment(holds.folder, **QUICK)
    with Node(address, "127.0.0.13", head=True, env=env) as head:
        until(lambda: nodes_up(address) == 1, "a head")
        holds.want("shard", r"/shards/\.shard-00001")
        words = (*SHORT, f"executor.address={address}")
        with Driver(every_stage, run_dir, words, environment(**QUICK)) as driver:
            holds.taken("shard", driver)
            head.kill("gcs_server")
            code, said = driver.end()
    assert code == 75, said
    assert f"error: the head of the Ray cluster, {address}, has not answered for 10 s" in said
    assert "the head of the Ray cluster" in events(run_dir, "run_failed")[-1]["error"]
    done = [event["unit"] for event in events(run_dir, "unit_done")]
    with Driver(every_stage, run_dir, SHORT) as driver:
        driver.succeed()
    resumed = [event["unit"] for event in events(run_dir, "unit_done") if event.get("resumed")]
    assert set(done) <= set(resumed)
    assert bytes_of(run_dir) == short_undisturbed


@dataclass(frozen=True)
class Network:
    """Two hosts with network namespaces of their own, on a bridge in a third; files are shared."""

    name: str = field(default_factory=lambda: f"cut{os.getpid()}")

    def ip(self, *words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    def within(self, host: str) -> list[str]:
        """Words that run a command on a host."""
        return ["nsenter", f"--net=/run/netns/{self.name}-{host}"]

    def link(self, host: str, state: str) -> None:
        """Cuts a host off (`down`), or connects it again (`up`)."""
        self.ip("-n", f"{self.name}-sw", "link", "set", f"v-{host}", state)

    def up(self) -> None:
        """In the namespace of the switch, which is there already."""
        switch = ["-n", f"{self.name}-sw"]
        self.ip(*switch, "link", "add", "br0", "type", "bridge")
        self.ip(*switch, "link", "set", "br0", "up")
        for number, host in enumerate(("a", "b"), start=1):
            own = f"{self.name}-{host}"
            self.ip("netns", "add", own)
            peer = ["type", "veth", "peer", "name", "eth0", "netns", own]
            self.ip(*switch, "link", "add", f"v-{host}", *peer)
            self.ip(*switch, "link", "set", f"v-{host}", "master", "br0", "up")
            self.ip("-n", own, "addr", "add", f"10.78.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self.ip("-n", own, "link", "set", device, "up")

    def down(self) -> None:
        for host in ("a", "b", "sw"):
            self.ip("netns", "del", f"{self.name}-{host}", check=False)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("nsenter"):
        pytest.skip("needs root, `ip` and `nsenter`: hosts are network namespaces")
    made = Network()
    try:
        made.ip("netns", "add", f"{made.name}-sw")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        made.up()
        yield made
    finally:
        made.down()


def test_a_node_cut_off_from_the_network_is_done_without_and_does_no_harm_when_it_is_back(
    every_stage: Inputs, short_undisturbed: dict[str, str], network: Network, tmp_path: Path
) -> None:
    run_dir, holds = tmp_path / "run", Holds(tmp_path / "holds")
    address, env = "10.78.0.1:6379", environment(**QUICK)
    here, there = network.within("a"), network.within("b")
    holding = environment(holds.folder, **QUICK)
    with (
        Node(address, "10.78.0.1", head=True, env=env, before=here),
        Node(address, "10.78.0.2", env=holding, before=there),
    ):
        until(lambda: nodes_up(address, here) == 2, "two nodes")
        holds.want("shard", r"/shards/\.shard")
        words = (*SHORT, f"executor.address={address}", "executor.workers=2")
        with Driver(every_stage, run_dir, words, env, before=here) as driver:
            worker = holds.taken("shard", driver)
            network.link("b", "down")
            until(lambda: events(run_dir, "stage_done")[-1]["stage"] != "corpus", "calibrated")
            # The unit is done; the worker that was cut off is still writing it, and goes on.
            network.link("b", "up")
            holds.release("shard")
            driver.succeed()
        until(lambda: not command_of(worker), "the lost worker ends")
    assert bytes_of(run_dir) == short_undisturbed
