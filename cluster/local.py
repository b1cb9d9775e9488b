"""Units one after another in this process: breakpoints work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.executor import Heed, Job, R, T, fix_threads, ignore, never


class LocalExecutor:
    """Runs every unit in the calling process."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def imap(
        self,
        job: Job[T, R],
        units: Sequence[T],
        stop: Callable[[], bool] = never,
        heed: Heed = ignore,
    ) -> Iterator[tuple[int, R]]:
        """Runs the units in their order; there is no worker to lose."""
        assert job.replicas is None, "one process is no replica of several"
        fix_threads(self._threads)
        worker = job.make_worker()
        for index, unit in enumerate(units):
            if stop():
                return
            yield index, worker(unit)

    def check_shared(self, run: Path, inputs: Sequence[Path]) -> None:
        """One process sees what it sees."""

    def locate(self, held: Callable[[], Sequence[str]]) -> None:
        """There is one node."""

    def heed(self, event: Mapping[str, Any]) -> None:
        """One process keeps no metrics."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None
