"""A replica over two nodes: allowed when the config says so, and then it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from cluster.errors import InfrastructureError
from cluster.executor import Job, Replicas
from cluster.expert_parallel import ExpertGroup
from cluster.ray import RayExecutor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    """Two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    # `ray.init` replaces the address of the loopback's first node, and of no other.
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"node_ip_address": "127.0.0.11"} | node)
    cluster.add_node(node_ip_address="127.0.0.12", **node)
    try:
        with RayExecutor(address=cluster.address) as started:
            yield started
    finally:
        cluster.shutdown()


def say_node(group: ExpertGroup) -> Callable[[Sequence[Path]], str]:
    import ray

    def run(bundle: Sequence[Path]) -> str:
        group.largest(0)
        return str(ray.util.get_node_ip_address())

    return run


def nodes_of(executor: RayExecutor, placement: Literal["STRICT_PACK", "PACK"]) -> Any:
    replicas = Replicas[Path, Any](2, say_node, placement)
    job = Job[Path, Any](lambda: lambda unit: None, stateful=True, replicas=replicas)
    return list(dict(executor.imap(job, [Path("one"), Path("two")])).values())


def test_pack_may_use_two_nodes(executor: RayExecutor) -> None:
    assert sorted(nodes_of(executor, "PACK")) == ["127.0.0.11", "127.0.0.12"]


def test_strict_pack_refuses_nodes_that_are_too_small_for_a_replica(executor: RayExecutor) -> None:
    with pytest.raises(InfrastructureError, match="no node can hold a replica of 2 ranks"):
        nodes_of(executor, "STRICT_PACK")
