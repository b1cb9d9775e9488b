"""One expert-parallel replica on Ray: N actors in one placement group, alive or dead together."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions as failures
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import InfrastructureError
from cluster.executor import Replicas, fix_threads

# A placement group that fits nowhere never fails by itself.
_ROOM_SECONDS = 120.0


def replicas_that_fit(ranks_per_node: Sequence[int], replicas: Replicas[Any, Any]) -> int:
    """How many replicas the nodes hold, given how many ranks each of them can hold."""
    if replicas.placement == "STRICT_PACK":
        return sum(count // replicas.ranks for count in ranks_per_node)
    return sum(ranks_per_node) // replicas.ranks


class Replica:
    """N actors that run a bundle of units together. Ray never restarts one of them: a process
    group cannot take a member back, so whoever loses a rank kills the replica and makes another."""

    def __init__(
        self,
        replicas: Replicas[Any, Any],
        options: dict[str, Any],
        threads: int,
        room_seconds: float = _ROOM_SECONDS,
    ) -> None:
        """Waits for room and starts the actors; they form their group when the first unit comes.

        Args:
            options: Ray's options of one rank.

        Raises:
            InfrastructureError: the cluster had no room for all ranks; names what is missing.
        """
        self._group = placement_group(
            [_bundle(options)] * replicas.ranks, strategy=replicas.placement
        )
        self._await_room(replicas, options, room_seconds)
        place = PlacementGroupSchedulingStrategy(self._group)
        actor = ray.remote(_Rank).options(max_restarts=0, scheduling_strategy=place, **options)
        self._actors = [actor.remote(replicas, rank, threads) for rank in range(replicas.ranks)]
        # Stays a reference: a rank that is lost before it has answered shows in every `run`.
        self._endpoint = self._actors[0].endpoint.remote()

    def run(self, bundle: Sequence[Any]) -> list[ray.ObjectRef]:
        """Starts a bundle on all ranks; reference r is that of rank r, which runs unit r."""
        return [actor.run.remote(tuple(bundle), self._endpoint) for actor in self._actors]

    def kill(self) -> None:
        """Ends all ranks at once and gives their room back."""
        for actor in self._actors:
            with suppress(failures.RayActorError):
                ray.kill(actor)
        remove_placement_group(self._group)

    def _await_room(
        self, replicas: Replicas[Any, Any], options: dict[str, Any], seconds: float
    ) -> None:
        try:
            ray.get(self._group.ready(), timeout=seconds)
        except failures.GetTimeoutError as error:
            remove_placement_group(self._group)
            raise InfrastructureError(
                f"no room for a replica after {seconds:.0f} s:"
                f" {_shortfall(_bundle(options), replicas)}"
            ) from error


class _Rank:
    """An actor that joins its replica and makes its worker once, when the first unit arrives."""

    def __init__(self, replicas: Replicas[Any, Any], rank: int, threads: int) -> None:
        fix_threads(threads)
        self._replicas, self._rank = replicas, rank
        self._worker: Callable[[Sequence[Any]], Any] | None = None

    def endpoint(self) -> tuple[str, int]:
        """This node's address and a port that is free now."""
        host = str(ray.util.get_node_ip_address())
        with socket.socket() as listener:
            listener.bind(("", 0))
            return host, int(listener.getsockname()[1])

    def run(self, bundle: Sequence[Any], endpoint: tuple[str, int]) -> Any:
        if self._worker is None:
            from cluster.expert_parallel import Place, join

            wanted = self._replicas
            place = Place(self._rank, wanted.ranks, *endpoint, wanted.timeout_s)
            self._worker = wanted.make_rank(join(place))
        return self._worker(bundle)


def _bundle(options: dict[str, Any]) -> dict[str, float]:
    """Resources of one rank, in the words of a placement group."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    return {name: options[key] for name, key in named.items() if options.get(key)}


def _shortfall(bundle: dict[str, float], replicas: Replicas[Any, Any]) -> str:
    free = ray.available_resources()
    wanted = {name: each * replicas.ranks for name, each in bundle.items()}
    missing = ", ".join(
        f"{name} {free.get(name, 0):,.0f} free of {count:,.0f} needed"
        for name, count in wanted.items()
        if free.get(name, 0) < count
    )
    spread = "on one node" if replicas.placement == "STRICT_PACK" else "on any nodes"
    what = f"{replicas.ranks} ranks of {bundle} {spread}"
    return f"{what}; {missing or 'enough is free, but not side by side'}"
