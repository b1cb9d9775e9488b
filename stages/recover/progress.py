"""The course of a training, one JSON line per step: for people, the report and the progress bar."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


class Course:
    """Appends lines; after a resumption, lines of steps that are done again are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        """`step`: updates that are done."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_course(path) if line["step"] <= step]
        path.write_text("".join(_line(each) for each in kept))
        self._path = path

    def add(self, line: dict[str, Any]) -> None:
        """One step; readers may look at any moment."""
        with self._path.open("a") as file:
            file.write(_line(line))


def read_course(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    found = []
    with suppress(OSError):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True) + "\n"
