"""Loaded by every Python that has this folder on its path: stops a process in the midst of a unit.

Units are short; a fault that is to hit one must know that it is there. A file `NAME.wanted` in the
folder COALESCE_HOLDS holds a regular expression. The first process that opens a temporary file
with such a path takes the wish (`NAME.held` with its process id) and waits until it is killed, or
`NAME.held` is removed. A second line, a number, lets it allocate as many bytes first.
"""

from __future__ import annotations

import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

_HOLDS = os.environ.get("COALESCE_HOLDS")


def _hold(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open" or not isinstance(arguments[0], str | os.PathLike):
        return
    path = str(arguments[0])
    if not path.endswith(".tmp"):
        return
    for wish in Path(str(_HOLDS)).glob("*.wanted"):
        with suppress(OSError):
            pattern, *number = wish.read_text().splitlines()
            if re.search(pattern, path):
                _take(wish, *map(int, number))


def _take(wish: Path, amount: int = 0) -> None:
    """Renaming is what makes one process the first."""
    mine = wish.with_suffix(f".{os.getpid()}")
    wish.rename(mine)
    mine.write_text(str(os.getpid()))
    held = wish.with_suffix(".held")
    mine.rename(held)
    ballast = [b"\1" * (64 << 20) for _ in range(amount >> 26)]
    while held.exists():
        time.sleep(0.02)
    del ballast


if _HOLDS:
    sys.addaudithook(_hold)
