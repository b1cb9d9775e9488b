"""A run longer than its time limit is finished by a chain of starts of one job.

A start that finished no unit is fruitless; a few in a row end the chain, since the next would be
no different: the time limit is shorter than a unit, or a node is broken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Chain:
    """What earlier starts of this job achieved, in a small file."""

    path: Path
    events: Path
    job: str

    def fruitless_so_far(self) -> int:
        """Fruitless starts in a row before this one."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(self.path.read_text())
            if found["job"] == self.job:
                return int(found["fruitless"])
        return 0

    def end_start(self, progress: int) -> int:
        """Records how many units this start finished; returns fruitless starts in a row."""
        count = 0 if progress else self.fruitless_so_far() + 1
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"job": self.job, "fruitless": count}) + "\n")
        os.replace(temporary, self.path)
        return count

    def counter(self) -> Callable[[], int]:
        """From now on: how many units have been finished since."""
        offset = self.events.stat().st_size if self.events.exists() else 0
        return lambda: _finished(self.events, offset)


def _finished(events: Path, offset: int) -> int:
    """Units that were run, not found done, in the events from an offset on."""
    if not events.exists():
        return 0
    with events.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode(errors="replace").splitlines()
    return sum(_is_fresh(line) for line in lines)


def _is_fresh(line: str) -> bool:
    with suppress(ValueError):
        event: dict[str, Any] = json.loads(line)
        return event.get("event") == "unit_done" and event.get("resumed") is False
    return False
