"""Runs the units of one stage on an executor, and says what happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cluster.executor import Executor, Job, Lost, Replicas, Resources
from orchestrator.config import ExecutorConfig
from orchestrator.events import EventLog
from orchestrator.interrupt import Stop
from orchestrator.unit_log import LogFolder, logged
from stages.errors import Paused
from stages.unit import Done, Unit, execute, peak_rss, read_marker, reset_peak_rss

U = TypeVar("U", bound=Unit)


_BY_TOKENS = ("calibrate", "carry", "evaluate", "teach", "recover")


class Scheduler:
    """Feeds stages to an executor; keeps the outcome of every unit."""

    def __init__(
        self,
        executor: Executor,
        events: EventLog,
        gpus_per_worker: int,
        stop: Stop | None = None,
        logs: Path | None = None,
    ) -> None:
        """`stop`: once it says so, no unit is started and `Interrupted` is raised. `logs`: the
        folder of the units' log files."""
        self._executor = executor
        self._stop = stop or Stop()
        self._events = events
        self._gpus = gpus_per_worker
        self._logs = logs
        self.done: dict[str, list[Done]] = {}

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop once what is under way has ended."""
        return self._stop()

    def stopped(self) -> None:
        """Raises Interrupted if it was."""
        self._stop.check()

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
            "unit_done",
            stage=stage,
            unit=stage,
            done=1,
            units=1,
            seconds=seconds,
            peak_rss_bytes=peak,
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
        progress = _Progress(self._events, stage, len(units))
        for turn, done in self._outcomes(stage, job, turns):
            results[order[turn]] = done
            progress.ended(done)
        if len(results) < len(units):
            self._stop.check()
        ordered = [results[index] for index in range(len(units))]
        self.done.setdefault(stage, []).extend(ordered)
        self._events.emit("stage_done", stage=stage, seconds=round(time.monotonic() - start, 3))
        return ordered

    def _outcomes(
        self, stage: str, job: Job[U, Done], units: Sequence[U]
    ) -> Iterator[tuple[int, Done]]:
        """What the executor yields; what goes wrong meanwhile becomes an event."""
        if not units:
            return
        logs = LogFolder.of(self._logs, stage) if self._logs else None
        heed = partial(self._lost, stage, logs)
        try:
            yield from self._executor.imap(
                logged(job, logs) if logs else job, units, self._stop, heed
            )
        except Exception as error:
            self._failed(stage, logs, error)
            raise

    def _lost(self, stage: str, logs: LogFolder | None, lost: Lost) -> None:
        for name in lost.units:
            self._events.emit(
                "unit_lost",
                stage=stage,
                unit=name,
                cause=lost.cause,
                times=lost.times,
                retried=lost.retried,
                error=_first_line(lost.error),
            )
            if logs is not None:
                logs.tell_lost(name, lost.error)

    def _failed(self, stage: str, logs: LogFolder | None, error: Exception) -> None:
        name = getattr(error, "unit", None)
        if name is not None and not isinstance(error, Paused):
            self._events.emit("unit_failed", stage=stage, unit=name, error=_first_line(str(error)))
            if logs is not None and not getattr(error, "__notes__", None):
                error.add_note(logs.note(name))


class _Progress:
    """Emits `unit_done` with what is left of a stage."""

    def __init__(self, events: EventLog, stage: str, units: int) -> None:
        self._events, self._stage, self._units = events, stage, units
        self._measure = "tokens" if stage in _BY_TOKENS else "bytes"
        self._done = self._fresh = self._amount = 0
        # Units that are found done only have their digests checked: no measure of the speed.
        self._begun = time.monotonic()

    def ended(self, done: Done) -> None:
        """One more unit."""
        now = time.monotonic()
        amount = 0 if done.resumed else int(done.result.get(self._measure, 0))
        self._done += 1
        self._amount += amount
        if done.resumed and not self._fresh:
            self._begun = now
        self._fresh += not done.resumed
        elapsed, left = now - self._begun, self._units - self._done
        self._events.emit(
            "unit_done",
            stage=self._stage,
            unit=done.name,
            done=self._done,
            units=self._units,
            seconds=done.seconds,
            peak_rss_bytes=done.peak_rss_bytes,
            resumed=done.resumed,
            amount=self._amount,
            of=self._measure,
            tokens=amount if self._measure == "tokens" else 0,
            elapsed_seconds=round(elapsed, 3),
            eta_seconds=round(elapsed / self._fresh * left, 1) if self._fresh else None,
            per_second=round(self._fresh / elapsed, 4) if self._fresh and elapsed else None,
        )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:500] if text.strip() else ""


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
        address=config.address,
        workers=config.workers,
        threads=config.threads_per_unit,
        max_retries=config.max_retries.lost,
        memory_retries=config.max_retries.out_of_memory,
    )
    with executor as started:
        yield started
