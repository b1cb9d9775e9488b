"""One process at a time works on a run."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from orchestrator.errors import RunFolderError
from orchestrator.run_folder import RunFolder

# A holder writes its name right after it has got the lock.
_NAMING_SECONDS = 5.0


@contextmanager
def exclusive(folder: RunFolder) -> Iterator[None]:
    """Keeps a second process off the run; the system lets go of the lock however this one ends.

    Raises:
        RunFolderError: another process works on the run.
    """
    with folder.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"another process works on {folder.root}: {_holder(file)}",
                f"wait for it (`coalesce status {folder.root}`), or end it",
            ) from error
        except OSError:
            pass  # a file system without locks: two runs at once are then the user's care
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    """Who holds the lock; of two processes that start at once, the first may not have said so."""
    deadline = time.monotonic() + _NAMING_SECONDS
    while True:
        file.seek(0)
        name = file.read()
        if (name.endswith("\n") and not _ended(name)) or time.monotonic() > deadline:
            return name.strip() or "which has not said its name"
        time.sleep(0.05)


def _ended(name: str) -> bool:
    """Whether the name is that of an earlier holder on this host, which was killed."""
    match name.split():
        case ["process", process, "on", host] if process.isdigit():
            return host == socket.gethostname() and not os.path.exists(f"/proc/{process}")
    return False
