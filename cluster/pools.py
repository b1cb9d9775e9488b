"""How units become Ray tasks, actors or replicas, and what is left of them when one is lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.executor import Job, R, T, fix_threads
from cluster.replica import Replica

if TYPE_CHECKING:
    from cluster.ray import RayExecutor


class Pool:
    """Starts bundles of units and says what to do when a worker is lost."""

    # Most units that are started together.
    bundle = 1
    # Seconds that the processes of a bundle may end apart.
    patience = math.inf

    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        self.executor = executor
        self.job = job
        self.slots = executor.slots(job.resources)

    def choose(
        self, waiting: list[int], units: Sequence[Any], busy: Counter[str | None]
    ) -> tuple[int, str | None]:
        """Takes the next unit off `waiting`, and the node to send it to (`Homes.choose`)."""
        return self.executor.homes.choose(waiting, units, self.slots, busy, self.idle_nodes())

    def idle_nodes(self) -> set[str]:
        """Nodes of processes that wait for a unit."""
        return set()

    def take(self, ref: ray.ObjectRef, unit: Any, answer: Any) -> Any:
        """The result of a unit, out of what its process gave; where it ran is remembered."""
        return answer

    def start(self, units: Sequence[Any], node: str | None) -> list[ray.ObjectRef]:
        """One reference per process. The first give the results of the units, in their order;
        whatever further ones give is not looked at, they only have to end well. `node`: where they
        should run; None: anywhere."""
        raise NotImplementedError

    def release(self, refs: list[ray.ObjectRef], *, lost: bool) -> None:
        """Called once for everything started, when it ended or a worker of it was lost."""

    def close(self) -> None:
        """Frees whatever the pool holds."""


class _TaskPool(Pool):
    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        super().__init__(executor, job)
        self._options = executor.options(job.resources) | {"max_retries": 0}
        # Made once: every new remote function is sent to the head node and stays there.
        self._function = ray.remote(_run_task)

    def start(self, units: Sequence[Any], node: str | None) -> list[ray.ObjectRef]:
        """See `Pool`."""
        task = self._function.options(**self._options, **_there(node))
        return [task.remote(self.job.make_worker, each, self.executor.threads) for each in units]

    def take(self, ref: ray.ObjectRef, unit: Any, answer: Any) -> Any:
        """See `Pool`."""
        node, result = answer
        self.executor.homes.remember(unit, node, result)
        return result


class _ActorPool(Pool):
    """Keeps one actor per unit in flight; a lost actor is replaced, its unit is run again."""

    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        super().__init__(executor, job)
        self._idle: list[_Hired] = []
        self._busy: dict[ray.ObjectRef, _Hired] = {}

    def idle_nodes(self) -> set[str]:
        """Nodes of actors that wait for a unit."""
        return {each.node for each in self._idle if each.node is not None}

    def start(self, units: Sequence[Any], node: str | None) -> list[ray.ObjectRef]:
        """An idle actor, best of this node; without one, a new actor."""
        (unit,) = units
        if self._idle:
            there = (i for i, each in enumerate(self._idle) if each.node == node)
            hired = self._idle.pop(next(there, -1))
        else:
            hired = _Hired(self._new_actor(node))
        ref = hired.actor.run.remote(unit)
        self._busy[ref] = hired
        return [ref]

    def take(self, ref: ray.ObjectRef, unit: Any, answer: Any) -> Any:
        """See `Pool`."""
        self._busy[ref].node, result = answer
        self.executor.homes.remember(unit, answer[0], result)
        return result

    def release(self, refs: list[ray.ObjectRef], *, lost: bool) -> None:
        """See `Pool`."""
        hired = self._busy.pop(refs[0])
        if not lost:
            self._idle.append(hired)

    def close(self) -> None:
        """Ends the actors."""
        for each in [*self._idle, *self._busy.values()]:
            ray.kill(each.actor)

    def _new_actor(self, node: str | None) -> Any:
        options = self.executor.options(self.job.resources) | _there(node)
        actor = ray.remote(_Worker).options(max_restarts=0, **options)
        return actor.remote(self.job.make_worker, self.executor.threads)


@dataclass
class _Hired:
    """An actor, and the node that it says it runs on."""

    actor: Any
    node: str | None = None


class _ReplicaPool(Pool):
    """Keeps one replica per bundle in flight; with one rank lost, the whole replica is replaced."""

    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        super().__init__(executor, job)
        assert job.replicas is not None
        self.bundle, self.patience = job.replicas.ranks, job.replicas.timeout_s
        self._idle: list[Replica] = []
        self._busy: dict[ray.ObjectRef, Replica] = {}

    def start(self, units: Sequence[Any], node: str | None) -> list[ray.ObjectRef]:
        replica = self._idle.pop() if self._idle else self._new_replica()
        refs = replica.run(units)
        self._busy[refs[0]] = replica
        return refs

    def release(self, refs: list[ray.ObjectRef], *, lost: bool) -> None:
        replica = self._busy.pop(refs[0])
        if lost:
            replica.kill()
        else:
            self._idle.append(replica)

    def close(self) -> None:
        for replica in [*self._idle, *self._busy.values()]:
            replica.kill()

    def _new_replica(self) -> Replica:
        assert self.job.replicas is not None
        options = self.executor.options(self.job.resources)
        return Replica(self.job.replicas, options, self.executor.threads)


def pool_of(executor: RayExecutor, job: Job[Any, Any]) -> Pool:
    if job.replicas is not None:
        return _ReplicaPool(executor, job)
    return (_ActorPool if job.stateful else _TaskPool)(executor, job)


class _Worker:
    """An actor that makes its worker once, when the first unit arrives."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]], threads: int) -> None:
        fix_threads(threads)
        self._make_worker = make_worker
        self._worker: Callable[[Any], Any] | None = None

    def run(self, unit: Any) -> tuple[str, Any]:
        if self._worker is None:
            self._worker = self._make_worker()
        return _this_node(), self._worker(unit)


def _run_task(make_worker: Callable[[], Callable[[T], R]], unit: T, threads: int) -> tuple[str, R]:
    fix_threads(threads)
    return _this_node(), make_worker()(unit)


def _this_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _there(node: str | None) -> dict[str, Any]:
    """Options that prefer a node; where it is gone, or others work on it, any will do."""
    if node is None:
        return {}
    there = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
    return {"scheduling_strategy": there}
