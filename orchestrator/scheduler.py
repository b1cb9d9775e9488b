"""Runs the units of one stage on an executor, and says what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from cluster.executor import Executor, Job, Replicas, Resources
from orchestrator.config import ExecutorConfig
from orchestrator.events import EventLog
from orchestrator.interrupt import Stop
from stages.unit import Done, Unit, execute, peak_rss, read_marker, reset_peak_rss

U = TypeVar("U", bound=Unit)


class Scheduler:
    """Feeds stages to an executor; keeps the outcome of every unit."""

    def __init__(
        self, executor: Executor, events: EventLog, gpus_per_worker: int, stop: Stop | None = None
    ) -> None:
        """`stop`: once it says so, no unit is started and `Interrupted` is raised."""
        self._executor = executor
        self._stop = stop or Stop()
        self._events = events
        self._gpus = gpus_per_worker
        self.done: dict[str, list[Done]] = {}

    def run(
        self,
        stage: str,
        units: Sequence[U],
        run_one: Callable[[U], dict[str, Any]],
        memory_bytes: int,
    ) -> list[Done]:
        """Units that need nothing but their own inputs."""
        resources = Resources(memory_bytes=memory_bytes)
        return self._run(stage, units, Job(partial(_stateless, run_one), resources=resources))

    def run_model(
        self,
        stage: str,
        units: Sequence[U],
        make_worker: Callable[[], Callable[[U], Done]],
        memory_bytes: int,
        replicas: Replicas[U, Done] | None = None,
    ) -> list[Done]:
        """Units whose worker holds a loaded model, or whose ranks hold one together."""
        resources = Resources(gpus=self._gpus, memory_bytes=memory_bytes)
        job = Job(make_worker, stateful=True, resources=resources, replicas=replicas)
        return self._run(stage, units, job)

    @contextmanager
    def here(self, stage: str) -> Iterator[None]:
        """A stage that the driver does itself, in seconds: timed and reported like the others."""
        self._stop.check()
        self._events.emit("stage_started", stage=stage, units=1)
        reset_peak_rss()
        start = time.monotonic()
        yield
        seconds, peak = round(time.monotonic() - start, 3), peak_rss()
        self.done[stage] = [Done(stage, {}, {}, seconds, peak)]
        self._events.emit(
            "unit_done", stage=stage, unit=stage, done=1, units=1, peak_rss_bytes=peak
        )
        self._events.emit("stage_done", stage=stage, seconds=seconds)

    def _run(self, stage: str, units: Sequence[U], job: Job[U, Done]) -> list[Done]:
        """Results in the order of the units, however they ended.

        Finished units are handed out as well: their digests are checked where they lie.
        """
        todo = [read_marker(unit) is None for unit in units]
        # Finished ones first: ranks that run units in step do not wait for one of them.
        order = sorted(range(len(units)), key=todo.__getitem__)
        finished = todo.count(False)
        self._events.emit("stage_started", stage=stage, units=len(units))
        if finished:
            self._events.emit("resuming", stage=stage, done=finished, units=len(units))
        start, results = time.monotonic(), dict[int, Done]()
        turns = [units[index] for index in order]
        for turn, done in self._executor.imap(job, turns, self._stop) if units else ():
            results[order[turn]] = done
            self._report(stage, results, len(units), done, time.monotonic() - start)
        if len(results) < len(units):
            self._stop.check()
        ordered = [results[index] for index in range(len(units))]
        self.done.setdefault(stage, []).extend(ordered)
        self._events.emit("stage_done", stage=stage, seconds=round(time.monotonic() - start, 3))
        return ordered

    def _report(
        self, stage: str, results: dict[int, Done], units: int, done: Done, elapsed: float
    ) -> None:
        measure = "tokens" if stage in ("calibrate", "evaluate") else "bytes"
        fresh = [each for each in results.values() if not each.resumed]
        self._events.emit(
            "unit_done",
            stage=stage,
            unit=done.name,
            done=len(results),
            units=units,
            seconds=done.seconds,
            peak_rss_bytes=done.peak_rss_bytes,
            resumed=done.resumed,
            amount=sum(int(each.result.get(measure, 0)) for each in fresh),
            of=measure,
            elapsed_seconds=round(elapsed, 3),
            eta_seconds=round(elapsed / len(results) * (units - len(results)), 1),
        )


def _stateless(run_one: Callable[[U], dict[str, Any]]) -> Callable[[U], Done]:
    return partial(_execute, run_one)


def _execute(run_one: Callable[[U], dict[str, Any]], unit: U) -> Done:
    return execute(unit, run_one)


@contextmanager
def open_executor(config: ExecutorConfig) -> Iterator[Executor]:
    """The executor that a config asks for; Ray is imported only when it is used."""
    if config.kind == "local":
        from cluster.local import LocalExecutor

        with LocalExecutor(config.threads_per_unit) as local:
            yield local
        return
    from cluster.ray import RayExecutor

    executor = RayExecutor(
        address=config.address, workers=config.workers, threads=config.threads_per_unit
    )
    with executor as started:
        yield started
