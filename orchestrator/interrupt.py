"""How a run is asked to stop, and how it answers. Imports neither torch nor ray.

SIGUSR1         no new units; those in flight end; exit 75: start me again
SIGTERM, SIGINT at once; exit 143, 130

Either way nothing is half-written: what a unit wrote counts only once its marker is there.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

AT_ONCE = (signal.SIGINT, signal.SIGTERM)
DRAIN = signal.SIGUSR1
EXIT_AGAIN = 75


class Interrupted(BaseException):
    """The run was asked to stop. No Exception: nothing that mends failures may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}; finished units are kept"

    @property
    def exit_code(self) -> int:
        """75 where another start was asked for, otherwise as a shell reports the signal."""
        return EXIT_AGAIN if self.signal == DRAIN else 128 + self.signal


class Stop:
    """Says whether units may still be taken."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None

    def check(self) -> None:
        """Raises Interrupted once no more units may be taken."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """While no unit is in flight, every signal ends the command at once."""
    stop = Stop()
    with _handlers(dict.fromkeys((*AT_ONCE, DRAIN), partial(_raise, stop))), _the_truth(stop):
        yield


@contextmanager
def heeding_signals() -> Iterator[Stop]:
    """While units are in flight. To be entered after `ray.init`, which sets a handler itself."""
    stop = Stop()
    handlers = dict.fromkeys(AT_ONCE, partial(_raise, stop)) | {DRAIN: partial(_note, stop)}
    with _handlers(handlers), _the_truth(stop):
        yield stop


def _note(stop: Stop, number: int, frame: FrameType | None) -> None:
    stop.number = stop.number or number


def _raise(stop: Stop, number: int, frame: FrameType | None) -> None:
    # Slurm and its launcher may both say it: once is enough, and must not disturb the clearing up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop.number = number
    raise Interrupted(number)


@contextmanager
def _the_truth(stop: Stop) -> Iterator[None]:
    """Code in other languages turns what a handler raises into errors of its own: Ray's `wait` into
    a SystemError."""
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        if stop.number in AT_ONCE:
            raise Interrupted(stop.number) from error
        # `ray.init` puts a handler of its own in place of ours, which exits with the bare number.
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            raise Interrupted(signal.SIGTERM) from error
        raise


@contextmanager
def _handlers(wanted: Mapping[signal.Signals, signal._HANDLER]) -> Iterator[None]:
    previous = {}
    with suppress(ValueError):  # handlers belong to the main thread; a library's caller keeps its
        for number, handler in wanted.items():
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            ours = isinstance(handler, partial) and handler.func is _raise
            if not (ours and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, handler)
