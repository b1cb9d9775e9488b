"""Units one after another in this process: breakpoints work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from cluster.executor import Job, R, T, fix_threads


class LocalExecutor:
    """Runs every unit in the calling process."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def imap(self, job: Job[T, R], units: Sequence[T]) -> Iterator[tuple[int, R]]:
        """Runs the units in their order."""
        assert job.replicas is None, "one process is no replica of several"
        fix_threads(self._threads)
        worker = job.make_worker()
        for index, unit in enumerate(units):
            yield index, worker(unit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None
