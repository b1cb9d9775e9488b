"""Waits until every node of an allocation has joined its Ray cluster; names those that have not.

A process of its own: the launcher must not load Ray.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ray

from cluster.slurm.rendezvous import Rendezvous

EXIT_MISSING = 75


def main() -> int:
    """0 once all nodes are there; 75 and a message otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("nodes", nargs="+")
    options = parser.parse_args()
    ray.init(options.address, log_to_driver=False, logging_level=logging.ERROR)
    rendezvous = Rendezvous(options.rendezvous)
    lacking = _await_all(options.nodes, rendezvous, options.seconds)
    ray.shutdown()
    if lacking:
        print(missing(lacking, rendezvous, len(options.nodes), options.seconds), flush=True)
    return EXIT_MISSING if lacking else 0


def missing(lacking: Sequence[str], rendezvous: Rendezvous, count: int, seconds: float) -> str:
    """Says which nodes did not join, and how far each of them got."""
    silent = [node for node in lacking if rendezvous.address_of(node) is None]
    parts = []
    if silent:
        parts.append(
            f"{', '.join(silent)} did not report at all (not started, or the run folder is not"
            " shared with it)"
        )
    if started := [node for node in lacking if node not in silent]:
        parts.append(
            f"{', '.join(started)} started but could not join (firewall between the nodes, or"
            " another version of Ray)"
        )
    return f"{len(lacking)} of {count} nodes missing after {seconds:.0f} s: {'; '.join(parts)}"


def _await_all(nodes: Sequence[str], rendezvous: Rendezvous, seconds: float) -> list[str]:
    """The nodes that are missing in the end."""
    deadline = time.monotonic() + seconds
    while True:
        alive = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        lacking = [node for node in nodes if rendezvous.address_of(node) not in alive]
        if not lacking or time.monotonic() > deadline:
            return lacking
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
