"""One log file per unit, written by the process that runs it: output, log records, traceback.

In a worker process everything goes there, C libraries included. In the driver itself (executor
`local`) only what the unit's own thread writes does: progress bars and other threads keep theirs.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast
from urllib.parse import quote

from cluster.executor import Job, Replicas
from stages.unit import Done, Unit

U = TypeVar("U", bound=Unit)
_ATTEMPT = "=== attempt "


@dataclass(frozen=True)
class LogFolder:
    """Where the units of a stage log, and which process is the driver. Can be pickled."""

    folder: Path  # logs/<stage>
    stage: str
    driver: tuple[str, int]

    @classmethod
    def of(cls, logs: Path, stage: str) -> LogFolder:
        """Called in the driver."""
        return cls(logs / stage, stage, _here())

    def path(self, name: str) -> Path:
        """The file of a unit; its name is one file name, whatever is in it."""
        short = name.removeprefix(f"{self.stage}/").replace("/", "--")
        return self.folder / f"{quote(short, safe=' ')[:200]}.log"

    def note(self, name: str) -> str:
        """What an error says about where to look."""
        return f"log of {name}: {self.path(name)}"

    def tell_lost(self, name: str, why: str) -> None:
        """Ends an attempt whose process could not say anything any more; called in the driver."""
        file = _open(self.path(name))
        if file is not None:
            _say(file, f"--- worker lost: {why}\n")
            _close(file)


def logged(job: Job[U, Done], logs: LogFolder) -> Job[U, Done]:
    """The same job, whose processes write a log file for each unit."""
    replicas: Replicas[U, Done] | None = None
    if job.replicas is not None:
        make_rank = _LoggedRank(job.replicas.make_rank, logs)
        replicas = Replicas(
            job.replicas.ranks, make_rank, job.replicas.placement, job.replicas.timeout_s
        )
    make_worker = _LoggedWorker(job.make_worker, logs)
    return Job(make_worker, job.stateful, job.resources, replicas)


@dataclass(frozen=True)
class _LoggedWorker:
    make_worker: Callable[[], Callable[[Any], Done]]
    logs: LogFolder

    def __call__(self) -> Callable[[Any], Done]:
        made: list[Callable[[Any], Done]] = []

        def run(unit: Unit) -> Done:
            with writing(self.logs, unit.name) as attempt:
                if not made:
                    made.append(self.make_worker())
                return attempt.ended(made[0](unit))

        return run


@dataclass(frozen=True)
class _LoggedRank:
    make_rank: Callable[[Any], Callable[[Sequence[Any]], Done | None]]
    logs: LogFolder

    def __call__(self, group: Any) -> Callable[[Sequence[Any]], Done | None]:
        made: list[Callable[[Sequence[Any]], Done | None]] = []

        def run(bundle: Sequence[Unit]) -> Done | None:
            # A rank without a unit of its own helps with the first one.
            own = group.rank < len(bundle)
            name = bundle[group.rank if own else 0].name
            with writing(self.logs, name if own else f"{name}.rank-{group.rank}") as attempt:
                if not made:
                    made.append(self.make_rank(group))
                done = made[0](bundle)
                return attempt.ended(done) if done is not None else None

        return run


class Attempt:
    """One attempt at one unit, as its log file tells it."""

    def __init__(self) -> None:
        self.done: Done | None = None

    def ended(self, done: Done) -> Done:
        """Notes the outcome."""
        self.done = done
        return done


@contextmanager
def writing(logs: LogFolder, name: str) -> Iterator[Attempt]:
    """Appends what this process says meanwhile to the unit's file.

    An exception is written with its traceback and gets a note that names the file. A unit that
    was found done and said nothing leaves no trace. Where no file can be written the unit runs all
    the same: results matter more than logs.
    """
    path, attempt = logs.path(name), Attempt()
    with ExitStack() as stack:
        file = _open(path)
        if file is None:
            yield attempt
            return
        stack.callback(_close, file)
        before = file.seek(0, os.SEEK_END)
        begun = _head(file, path, name)
        start = time.monotonic()
        try:
            with _redirected(file, dedicated=_here() != logs.driver):
                yield attempt
        except BaseException as error:
            _say(file, f"{traceback.format_exc()}--- failed after {_since(start)}\n")
            error.add_note(logs.note(name))
            error.__dict__.setdefault("unit", name)
            raise
        if attempt.done is not None and attempt.done.resumed and _size(file) == begun:
            file.truncate(before)
            if before == 0:
                path.unlink(missing_ok=True)
            return
        peak = f", peak memory {attempt.done.peak_rss_bytes >> 20} MiB" if attempt.done else ""
        _say(file, f"--- done after {_since(start)}{peak}\n")


def attempts(text: str) -> int:
    """How many attempts a log file tells of."""
    return sum(line.startswith(_ATTEMPT) for line in text.splitlines())


def _open(path: Path) -> io.TextIOWrapper | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Appending writes of two processes (a lost worker may still live) do not overwrite.
        return path.open("a+", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError:
        return None


def _close(file: TextIO) -> None:
    with suppress(OSError):
        file.close()


def _head(file: TextIO, path: Path, name: str) -> int:
    """Writes the line that begins an attempt; returns the size of the file after it."""
    host, process = _here()
    with suppress(OSError):
        number = attempts(path.read_text(errors="replace")) + 1
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        _say(file, f"{_ATTEMPT}{number} of {name}: {when} host {host} pid {process} ===\n")
    return _size(file)


def _say(file: TextIO, text: str) -> None:
    with suppress(OSError):
        file.write(text)
        file.flush()


def _size(file: TextIO) -> int:
    return os.fstat(file.fileno()).st_size


def _since(start: float) -> str:
    return f"{time.monotonic() - start:.3f} s"


def _here() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


@contextmanager
def _redirected(file: TextIO, *, dedicated: bool) -> Iterator[None]:
    """`dedicated`: this process does nothing but run units, so its descriptors can be turned."""
    with warnings.catch_warnings():
        # The same warning in two units is told in both of their logs.
        warnings.simplefilter("default", append=True)
        if dedicated:
            with _descriptors(file):
                yield
            return
        with (
            redirect_stdout(cast(TextIO, _OfThread(file, sys.stdout))),
            redirect_stderr(cast(TextIO, _OfThread(file, sys.stderr))),
            _records(file),
        ):
            yield


@contextmanager
def _descriptors(file: TextIO) -> Iterator[None]:
    """Turns descriptors 1 and 2, through which also C libraries and crash reports speak."""
    kept = {number: os.dup(number) for number in (1, 2)}
    _flush()
    for number in kept:
        os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        _flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


class _OfThread:
    """Stands for a stream: what the thread that made it writes goes to the file."""

    def __init__(self, file: TextIO, stream: TextIO) -> None:
        self._file, self._stream = file, stream
        self._owner = threading.get_ident()

    def write(self, text: str) -> int:
        """Writes to the stream of the calling thread."""
        if threading.get_ident() != self._owner:
            return self._stream.write(text)
        _say(self._file, text)
        return len(text)

    def isatty(self) -> bool:
        """A log file is no terminal."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _records(file: TextIO) -> Iterator[None]:
    """Log records of this thread; also of loggers that hand nothing on to the root."""
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    owner = threading.get_ident()
    handler.addFilter(lambda record: record.thread == owner)
    known = logging.root.manager.loggerDict.values()
    closed = [each for each in known if isinstance(each, logging.Logger) and not each.propagate]
    loggers = [logging.getLogger(), *closed]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
