"""Units on Ray: plain tasks, or a pool of actors where a worker holds a loaded model.

Weights never pass through the object store: units name paths, results are small dictionaries.
Only infrastructure failures are retried; an error raised by a unit ends the run at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import ray.exceptions as failures

from cluster.errors import InfrastructureError, LostPeer
from cluster.executor import Job, R, Resources, T, fix_threads, never
from cluster.replica import Replica, replicas_that_fit
from cluster.shared import check_shared

# Small results only; Ray's default would reserve 30 % of the memory.
_OBJECT_STORE_BYTES = 200 << 20
_LOST = (
    failures.WorkerCrashedError,
    failures.RayActorError,
    failures.NodeDiedError,
    LostPeer,
)


class RayExecutor:
    """Runs units as Ray tasks or actors on a cluster that it joins, or starts and stops itself."""

    def __init__(
        self,
        *,
        address: str = "local",
        workers: int | None = None,
        threads: int = 1,
        max_retries: int = 3,
    ) -> None:
        self._address = address
        self._wanted = workers
        self._threads = threads
        self._max_retries = max_retries

    def imap(
        self, job: Job[T, R], units: Sequence[T], stop: Callable[[], bool] = never
    ) -> Iterator[tuple[int, R]]:
        """Runs the units with a bounded number in flight."""
        pool = _pool_of(self, job)
        try:
            yield from _drive(pool, units, min(self._width(job), len(units)), stop)
        finally:
            pool.close()

    def check_shared(self, run: Path, inputs: Sequence[Path]) -> None:
        """A task on every node reads a file that this process writes, and answers with one."""
        check_shared(run, inputs)

    def _width(self, job: Job[Any, Any]) -> int:
        """Units in flight: as many as fit the nodes, and no more than the configured workers.

        An actor that does not fit would wait for ever, and its unit with it.

        Raises:
            InfrastructureError: no node can hold a single one.
        """
        resources, ranks = job.resources, job.replicas.ranks if job.replicas else 1
        needs = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_bytes}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        each = [_fits(needs, node) for node in nodes]
        room = replicas_that_fit(each, job.replicas) if job.replicas else sum(each)
        if not room:
            most = {name: max(int(node.get(name, 0)) for node in nodes) for name in needs}
            what = f"a replica of {ranks} ranks: each" if job.replicas else "one worker: it"
            raise InfrastructureError(
                f"no node can hold {what} needs {needs}, the largest nodes have {most}"
            )
        return max(min(room, self._wanted // ranks), 1) if self._wanted else room

    def options(self, resources: Resources) -> dict[str, Any]:
        """Ray's options for one unit or actor."""
        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        return options | ({"memory": resources.memory_bytes} if resources.memory_bytes else {})

    @property
    def threads(self) -> int:
        """Threads inside a unit."""
        return self._threads

    @property
    def max_retries(self) -> int:
        """How often one unit is run again after its worker or node was lost."""
        return self._max_retries

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own: dict[str, Any] = {
            "num_cpus": self._wanted,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        ray.init(
            address=self._address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if self._address == "local" else {}),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Stops the cluster only when this process started it; otherwise it disconnects.
        ray.shutdown()


def _fits(needs: dict[str, int], node: dict[str, float]) -> int:
    """How many workers a node can hold."""
    return min(int(node.get(name, 0) // need) for name, need in needs.items() if need)


class _Pool:
    """Starts units and says what to do when a worker is lost."""

    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        self.executor = executor
        self.job = job

    def start(self, unit: Any) -> list[ray.ObjectRef]:
        """One reference per process that runs the unit; the first gives the result."""
        raise NotImplementedError

    def release(self, refs: list[ray.ObjectRef], *, lost: bool) -> None:
        """Called once for every started unit, when it ended or a worker of it was lost."""

    def close(self) -> None:
        """Frees whatever the pool holds."""


class _TaskPool(_Pool):
    def start(self, unit: Any) -> list[ray.ObjectRef]:
        options = self.executor.options(self.job.resources)
        task = ray.remote(_run_task).options(max_retries=0, **options)
        return [task.remote(self.job.make_worker, unit, self.executor.threads)]


class _ActorPool(_Pool):
    """Keeps one actor per unit in flight; a lost actor is replaced, its unit is run again."""

    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        super().__init__(executor, job)
        self._idle: list[Any] = []
        self._busy: dict[ray.ObjectRef, Any] = {}

    def start(self, unit: Any) -> list[ray.ObjectRef]:
        actor = self._idle.pop() if self._idle else self._new_actor()
        ref = actor.run.remote(unit)
        self._busy[ref] = actor
        return [ref]

    def release(self, refs: list[ray.ObjectRef], *, lost: bool) -> None:
        actor = self._busy.pop(refs[0])
        if not lost:
            self._idle.append(actor)

    def close(self) -> None:
        for actor in [*self._idle, *self._busy.values()]:
            ray.kill(actor)

    def _new_actor(self) -> Any:
        options = self.executor.options(self.job.resources)
        actor = ray.remote(_Worker).options(max_restarts=0, **options)
        return actor.remote(self.job.make_worker, self.executor.threads)


class _ReplicaPool(_Pool):
    """Keeps one replica per unit in flight; with one rank lost, the whole replica is replaced."""

    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        super().__init__(executor, job)
        self._idle: list[Replica] = []
        self._busy: dict[ray.ObjectRef, Replica] = {}

    def start(self, unit: Any) -> list[ray.ObjectRef]:
        replica = self._idle.pop() if self._idle else self._new_replica()
        refs = replica.run(unit)
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


def _pool_of(executor: RayExecutor, job: Job[Any, Any]) -> _Pool:
    if job.replicas is not None:
        return _ReplicaPool(executor, job)
    return (_ActorPool if job.stateful else _TaskPool)(executor, job)


class _Worker:
    """An actor that makes its worker once, when the first unit arrives."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]], threads: int) -> None:
        fix_threads(threads)
        self._make_worker = make_worker
        self._worker: Callable[[Any], Any] | None = None

    def run(self, unit: Any) -> Any:
        if self._worker is None:
            self._worker = self._make_worker()
        return self._worker(unit)


def _run_task(make_worker: Callable[[], Callable[[T], R]], unit: T, threads: int) -> R:
    fix_threads(threads)
    return make_worker()(unit)


def _drive(
    pool: _Pool, units: Sequence[Any], width: int, stop: Callable[[], bool]
) -> Iterator[tuple[int, Any]]:
    """Feeds units into the pool, `width` at a time, and yields results as they end."""
    waiting = list(reversed(range(len(units))))
    attempts = dict.fromkeys(range(len(units)), 0)
    running: dict[int, list[ray.ObjectRef]] = {}
    while waiting or running:
        while waiting and len(running) < width and not stop():
            index = waiting.pop()
            attempts[index] += 1
            running[index] = pool.start(units[index])
        if not running:
            return
        index, error = _next_ended(running)
        refs = running.pop(index)
        # The unit's own exception, as it would have been raised in this process.
        own = error.cause if isinstance(error, failures.RayTaskError) else None
        if isinstance(own or error, _LOST):
            pool.release(refs, lost=True)
            if attempts[index] > pool.executor.max_retries:
                raise InfrastructureError(
                    f"{units[index].name} lost its worker {attempts[index]} times: {error}"
                ) from error
            waiting.append(index)
        elif error is not None:
            # Nobody knows in which state the peers of a failed rank are.
            pool.release(refs, lost=len(refs) > 1)
            raise own or error from error
        else:
            result = ray.get(refs[0])
            pool.release(refs, lost=False)
            yield index, result


def _next_ended(running: dict[int, list[ray.ObjectRef]]) -> tuple[int, Exception | None]:
    """The next unit of which every process ended well, or any one failed, and how it failed."""
    pending = {ref: index for index, refs in running.items() for ref in refs}
    while True:
        (ref,), _ = ray.wait(list(pending), num_returns=1)
        index = pending.pop(ref)
        try:
            ray.get(ref)
        except (*_LOST, failures.RayTaskError) as error:
            return index, error
        if index not in pending.values():
            return index, None
