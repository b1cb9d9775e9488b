"""Ends a process that has waited too long for the other ranks of its replica.

A peer that died shows at once: its connections break. One that is alive but silent (stopped,
swapped out, stuck in a driver) does not, and a thread that waits in a collective cannot be woken.
So the process that waits gives itself up: whoever started it sees a lost rank.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

# For people who look at exit codes: EX_TEMPFAIL, try again.
EXIT_CODE = 75


class Watchdog:
    """Watches the waits of one process, which come one after another."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        Thread(target=self._watch, daemon=True, name="watchdog").start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A wait for others; the process ends when it takes longer than the seconds given."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(self._seconds / 10, 5.0))
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                print(f"a rank was silent for {self._seconds:g} s", file=sys.stderr, flush=True)
                # Nothing can be unwound: the main thread is inside the collective.
                os._exit(EXIT_CODE)
