"""events.jsonl: one line per state change. Progress, status and report read nothing else."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """Appends events to a file and tells listeners."""

    def __init__(self, path: Path, listeners: Sequence[Listener] = ()) -> None:
        self._path = path
        self._listeners = list(listeners)

    def listen(self, listener: Listener) -> None:
        """Tells one more listener, of what comes from now on."""
        self._listeners.append(listener)

    def emit(self, kind: str, **fields: Any) -> None:
        """Writes one line at once: a killed run loses none that it had reported."""
        event: Event = {"time": round(time.time(), 3), "event": kind, **fields}
        with self._path.open("ab+") as file:
            # A line that a kill cut off must not swallow this one.
            start = b"\n" if _ends_within_a_line(file) else b""
            file.write(start + json.dumps(event).encode() + b"\n")
        for listener in self._listeners:
            listener(event)


def _ends_within_a_line(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def read_events(path: Path) -> Iterator[Event]:
    """All complete lines; a line that was cut off by a kill is passed over."""
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
