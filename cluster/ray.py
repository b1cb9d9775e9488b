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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import ray.exceptions as failures
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import InfrastructureError, LostPeer
from cluster.executor import (
    Cause,
    Heed,
    Job,
    Lost,
    R,
    Resources,
    T,
    ignore,
    never,
)  # fmt: skip
from cluster.head import Head
from cluster.losses import in_short, short_of_memory
from cluster.metrics import Metrics
from cluster.placement import Homes
from cluster.pools import Pool, pool_of
from cluster.replica import replicas_that_fit
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
# Knowing where files lie saves traffic; it is nothing to wait long for.
_LOCATE_SECONDS = 60.0


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
        # Of all stages of a run: what one fetches to a node, the next one reads there.
        self.homes = Homes()

    def imap(
        self,
        job: Job[T, R],
        units: Sequence[T],
        stop: Callable[[], bool] = never,
        heed: Heed = ignore,
    ) -> Iterator[tuple[int, R]]:
        """Runs the units with a bounded number in flight."""
        pool = pool_of(self, job)
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

    def locate(self, held: Callable[[], Sequence[str]]) -> None:
        """A task on every node that runs units; one that does not answer is not asked again."""
        nodes = [node for node, count in self.slots(Resources()).items() if count]
        asked = {node: ray.remote(_call).options(**_only(node)).remote(held) for node in nodes}
        ray.wait([*asked.values()], num_returns=len(asked), timeout=_LOCATE_SECONDS)
        for node, answer in asked.items():
            with suppress(failures.RayError, failures.GetTimeoutError):
                for key in ray.get(answer, timeout=0):
                    self.homes.settle(key, node)

    def _width(self, job: Job[Any, Any]) -> int:
        """Units in flight: as many as fit the nodes, and no more than the configured workers.

        An actor that does not fit would wait for ever, and its unit with it.

        Raises:
            InfrastructureError: no node can hold a single one.
        """
        resources, ranks = job.resources, job.replicas.ranks if job.replicas else 1
        needs = _needs(resources)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        each = list(self.slots(resources).values())
        room = replicas_that_fit(each, job.replicas) if job.replicas else sum(each)
        if not room:
            most = {name: max(int(node.get(name, 0)) for node in nodes) for name in needs}
            what = f"a replica of {ranks} ranks: each" if job.replicas else "one worker: it"
            raise InfrastructureError(
                f"no node can hold {what} needs {needs}, the largest nodes have {most}"
            )
        return max(min(room, self._wanted // ranks), 1) if self._wanted else room

    def slots(self, resources: Resources) -> dict[str, int]:
        """Node -> how many such units fit on it."""
        needs = _needs(resources)
        alive = (node for node in ray.nodes() if node["Alive"])
        return {node["NodeID"]: _fits(needs, node["Resources"]) for node in alive}

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


def _call(function: Callable[[], R]) -> R:
    return function()


def _only(node: str) -> dict[str, Any]:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}


def _needs(resources: Resources) -> dict[str, int]:
    return {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_bytes}


def _fits(needs: dict[str, int], node: dict[str, float]) -> int:
    """How many workers a node can hold."""
    return min(int(node.get(name, 0) // need) for name, need in needs.items() if need)


@dataclass
class _Flight:
    """A bundle that is being run: the indices of its units, and a reference per process."""

    bundle: list[int]
    refs: list[ray.ObjectRef]
    open: list[ray.ObjectRef]  # those that have not ended
    # The node that it was sent to; None: Ray chose.
    node: str | None = None
    # When all must have ended; set once the first has.
    deadline: float = math.inf


def _drive(
    pool: Pool, units: Sequence[Any], width: int, stop: Callable[[], bool], heed: Heed
) -> Iterator[tuple[int, Any]]:
    """Feeds units into the pool, `width` bundles at a time, and yields results as they end."""
    waiting = list(reversed(range(len(units))))
    losses: Counter[tuple[int, Cause]] = Counter()
    running: list[_Flight] = []
    while waiting or running:
        while waiting and len(running) < width and not stop():
            # The last units are spread over the free replicas, not packed into one.
            share = -(-len(waiting) // (width - len(running)))
            turn, node = pool.choose(waiting, units, Counter(each.node for each in running))
            bundle = [turn, *(waiting.pop() for _ in range(min(pool.bundle, share) - 1))]
            refs = pool.start([units[index] for index in bundle], node)
            running.append(_Flight(bundle, refs, list(refs), node))
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
            answers = ray.get(ended.refs[: len(ended.bundle)])
            answered = zip(ended.refs, ended.bundle, answers, strict=False)
            results = [pool.take(ref, units[turn], each) for ref, turn, each in answered]
            pool.release(ended.refs, lost=False)
            yield from zip(ended.bundle, results, strict=True)


def _spend(
    pool: Pool,
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
