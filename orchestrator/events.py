"""events.jsonl: one line per state change. Progress, status and report read nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """Appends events to a file and tells listeners."""

    def __init__(self, path: Path, listeners: Sequence[Listener] = ()) -> None:
        self._path = path
        self._listeners = list(listeners)

    def emit(self, kind: str, **fields: Any) -> None:
        """Writes one line at once: a killed run loses none that it had reported."""
        event: Event = {"time": round(time.time(), 3), "event": kind, **fields}
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        for listener in self._listeners:
            listener(event)


def read_events(path: Path) -> Iterator[Event]:
    """All complete lines; a line that was cut off by a kill is passed over."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
