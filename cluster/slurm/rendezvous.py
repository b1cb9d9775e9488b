"""Small files in the run folder by which the nodes of one start of a job find each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_HEAD, _STEP = "head", "step"


@dataclass(frozen=True)
class Rendezvous:
    """A folder that all nodes see; every file is complete once it is there."""

    folder: Path

    def announce_head(self, address: str) -> None:
        """Says where the head listens, as `host:port`."""
        self._write(_HEAD, address)

    def announce_step(self, number: str) -> None:
        """Says which step of the job the nodes are."""
        self._write(_STEP, number)

    def step(self) -> str | None:
        """Number of the step, once its first node has started."""
        return self._read(_STEP)

    def announce_node(self, node: str, address: str) -> None:
        """Says that a node has started, and under which address it will join."""
        self._write(f"node-{node}", address)

    def head(self) -> str | None:
        """Where the head listens, once it does."""
        return self._read(_HEAD)

    def await_head(self, seconds: float, given_up: Callable[[], bool]) -> str | None:
        """The head's address, or None after this long or once `given_up()`."""
        deadline = time.monotonic() + seconds
        while (found := self.head()) is None:
            if time.monotonic() > deadline or given_up():
                return None
            time.sleep(0.2)
        return found

    def address_of(self, node: str) -> str | None:
        """A node's address, once it has started."""
        return self._read(f"node-{node}")

    def _write(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(text)
        os.replace(temporary, self.folder / name)

    def _read(self, name: str) -> str | None:
        with suppress(OSError):
            return (self.folder / name).read_text()
        return None
