"""Units on Ray: plain tasks, or a pool of actors where a worker holds a loaded model.

Weights never pass through the object store: units name paths, results are small dictionaries.
Only infrastructure failures are retried; an error raised by a unit ends the run at once.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import ray.exceptions as failures

from cluster.errors import InfrastructureError, LostPeer
from cluster.executor import (
    Cause,
    Heed,
    Job,
    Lost,
    R,
    Resources,
    T,
    fix_threads,
    ignore,
    never,
)  # fmt: skip
from cluster.head import Head
from cluster.losses import in_short, short_of_memory
from cluster.metrics import Metrics
from cluster.replica import Replica, replicas_that_fit
from cluster.shared import check_shared

# Small results only; Ray's default would reserve 30 % of the memory.
_OBJECT_STORE_BYTES = 200 << 20
_LOST = (
    failures.WorkerCrashedError,
    failures.RayActorError,
    failures.NodeDiedError,
    failures.OutOfMemoryError,
    LostPeer,
)
# After Ray's memory monitor has ended a worker; twice as long each time that it ends the same unit.
_MEMORY_PAUSE_SECONDS = 2.0
# While no unit ends, the cluster's head is looked for as often as this.
_LOOK_SECONDS = 5.0


class RayExecutor:
    """Runs units as Ray tasks or actors on a cluster that it joins, or starts and stops itself."""

    def __init__(
        self,
        *,
        address: str = "local",
        workers: int | None = None,
        threads: int = 1,
        max_retries: int = 3,
        memory_retries: int = 3,
    ) -> None:
        """`max_retries`: of one unit whose worker, node or peer was lost. `memory_retries`: of one
        whose worker was killed because its node ran out of memory."""
        self._address = address
        self._wanted = workers
        self._threads = threads
        self._budgets: dict[Cause, int] = {"lost": max_retries, "out_of_memory": memory_retries}
        self.metrics = Metrics()

    def imap(
        self,
        job: Job[T, R],
        units: Sequence[T],
        stop: Callable[[], bool] = never,
        heed: Heed = ignore,
    ) -> Iterator[tuple[int, R]]:
        """Runs the units with a bounded number in flight."""
        pool = _pool_of(self, job)
        try:
            yield from _drive(pool, units, min(self._width(job), len(units)), stop, heed)
        except failures.RayTaskError:
            raise  # of a unit, and without a cause that could be raised in its place
        except failures.RayError as error:
            raise InfrastructureError(f"the Ray cluster failed: {error}") from error
        finally:
            pool.close()

    def check_head(self) -> None:
        """Raises InfrastructureError once the cluster's head is lost."""
        self._head.check()

    def heed(self, event: Mapping[str, Any]) -> None:
        """Counts it in Ray's own metrics."""
        self.metrics.count(event)

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

    def budget(self, cause: Cause) -> int:
        """How often one unit is run again after it was lost to this cause."""
        return self._budgets[cause]

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
        self._head = Head()
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
    """Starts bundles of units and says what to do when a worker is lost."""

    # Most units that are started together.
    bundle = 1
    # Seconds that the processes of a bundle may end apart.
    patience = math.inf

    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        self.executor = executor
        self.job = job

    def start(self, units: Sequence[Any]) -> list[ray.ObjectRef]:
        """One reference per process. The first give the results of the units, in their order;
        whatever further ones give is not looked at, they only have to end well."""
        raise NotImplementedError

    def release(self, refs: list[ray.ObjectRef], *, lost: bool) -> None:
        """Called once for everything started, when it ended or a worker of it was lost."""

    def close(self) -> None:
        """Frees whatever the pool holds."""


class _TaskPool(_Pool):
    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        super().__init__(executor, job)
        options = executor.options(job.resources)
        # Made once: every new remote function is sent to the head node and stays there.
        self._task = ray.remote(_run_task).options(max_retries=0, **options)

    def start(self, units: Sequence[Any]) -> list[ray.ObjectRef]:
        task = self._task
        return [task.remote(self.job.make_worker, each, self.executor.threads) for each in units]


class _ActorPool(_Pool):
    """Keeps one actor per unit in flight; a lost actor is replaced, its unit is run again."""

    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        super().__init__(executor, job)
        self._idle: list[Any] = []
        self._busy: dict[ray.ObjectRef, Any] = {}

    def start(self, units: Sequence[Any]) -> list[ray.ObjectRef]:
        (unit,) = units
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
    """Keeps one replica per bundle in flight; with one rank lost, the whole replica is replaced."""

    def __init__(self, executor: RayExecutor, job: Job[Any, Any]) -> None:
        super().__init__(executor, job)
        assert job.replicas is not None
        self.bundle, self.patience = job.replicas.ranks, job.replicas.timeout_s
        self._idle: list[Replica] = []
        self._busy: dict[ray.ObjectRef, Replica] = {}

    def start(self, units: Sequence[Any]) -> list[ray.ObjectRef]:
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


@dataclass
class _Flight:
    """A bundle that is being run: the indices of its units, and a reference per process."""

    bundle: list[int]
    refs: list[ray.ObjectRef]
    open: list[ray.ObjectRef]  # those that have not ended
    # When all must have ended; set once the first has.
    deadline: float = math.inf


def _drive(
    pool: _Pool, units: Sequence[Any], width: int, stop: Callable[[], bool], heed: Heed
) -> Iterator[tuple[int, Any]]:
    """Feeds units into the pool, `width` bundles at a time, and yields results as they end."""
    waiting = list(reversed(range(len(units))))
    losses: Counter[tuple[int, Cause]] = Counter()
    running: list[_Flight] = []
    while waiting or running:
        while waiting and len(running) < width and not stop():
            # The last units are spread over the free replicas, not packed into one.
            share = -(-len(waiting) // (width - len(running)))
            bundle = [waiting.pop() for _ in range(min(pool.bundle, share))]
            refs = pool.start([units[index] for index in bundle])
            running.append(_Flight(bundle, refs, list(refs)))
        pool.executor.metrics.in_flight(sum(len(flight.bundle) for flight in running))
        if not running:
            return
        ended, error = _next_ended(running, pool.patience, pool.executor.check_head)
        running.remove(ended)
        # The unit's own exception, as it would have been raised in this process.
        own = error.cause if isinstance(error, failures.RayTaskError) else None
        if isinstance(own or error, _LOST):
            pool.release(ended.refs, lost=True)
            pool.executor.check_head()
            cause, times = _spend(pool, units, ended.bundle, own or error, losses, heed)
            waiting.extend(reversed(ended.bundle))
            if cause == "out_of_memory":
                # Fewer side by side need less; and others may be about to let go of theirs.
                width = max(width - 1, 1)
                time.sleep(_MEMORY_PAUSE_SECONDS * 2 ** (times - 1))
        elif error is not None:
            # Nobody knows in which state the peers of a failed rank are.
            pool.release(ended.refs, lost=len(ended.refs) > 1)
            raise own or error from error
        else:
            results = ray.get(ended.refs[: len(ended.bundle)])
            pool.release(ended.refs, lost=False)
            yield from zip(ended.bundle, results, strict=True)


def _spend(
    pool: _Pool,
    units: Sequence[Any],
    bundle: Sequence[int],
    error: BaseException | None,
    losses: Counter[tuple[int, Cause]],
    heed: Heed,
) -> tuple[Cause, int]:
    """Takes one retry from the budgets of a lost bundle, and says so: the cause, how often it was.

    Raises:
        InfrastructureError: nothing was left.
    """
    cause: Cause = "out_of_memory" if short_of_memory(error) else "lost"
    losses.update((index, cause) for index in bundle)
    times = max(losses[index, cause] for index in bundle)
    names = [units[index].name for index in bundle]
    retried = times <= pool.executor.budget(cause)
    said = in_short(error)
    heed(Lost(names, cause, times, retried, said))
    if not retried:
        why = "ran out of memory" if cause == "out_of_memory" else "lost its worker"
        spent = InfrastructureError(f"{' with '.join(names)} {why} {times} times: {said}")
        spent.__dict__["unit"] = names[0]
        raise spent from error
    return cause, times


def _next_ended(
    running: list[_Flight], patience: float, check_head: Callable[[], None]
) -> tuple[_Flight, Exception | None]:
    """The next bundle of which every process ended well, or any one failed, and how it failed."""
    while True:
        pending = {ref: flight for flight in running for ref in flight.open}
        first = min(running, key=lambda flight: flight.deadline)
        left = max(first.deadline - time.monotonic(), 0)
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(left, _LOOK_SECONDS))
        if not ready and left > _LOOK_SECONDS:
            check_head()
            continue
        if not ready:
            return first, LostPeer(f"a rank was silent for {patience:g} s after another had ended")
        flight = pending[ready[0]]
        flight.open.remove(ready[0])
        try:
            ray.get(ready[0])
        except (*_LOST, failures.RayTaskError) as error:
            return flight, error
        if not flight.open:
            return flight, None
        flight.deadline = min(flight.deadline, time.monotonic() + patience)
