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
def exclusive(folder: RunFolder) -> Iterator[str | None]:
    """Keeps a second process off the run; the system lets go of the lock however this one ends.

    Yields:
        the holder before, where it was on another host and did not say that it ended: it was killed
        or its host was lost, or it works still and this file system keeps locks to one host.

    Raises:
        RunFolderError: another process works on the run.
    """
    with folder.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(file)
            raise RunFolderError(
                f"another process works on {folder.root}: {holder}", _remedy(folder, holder)
            ) from error
        except OSError:
            pass  # a file system without locks: two runs at once are then the user's care
        file.seek(0)
        before = file.read().strip()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield before if _host(before) not in ("", socket.gethostname()) else None
        finally:
            file.truncate(0)


def _remedy(folder: RunFolder, holder: str) -> str:
    """What to do: on another host the process may be gone, and only the file server not know it."""
    found = f"wait for it (`coalesce status {folder.root}`), or end it"
    host = _host(holder)
    if host in ("", socket.gethostname()):
        return found
    return (
        f"{found}; if {host} is down, its lock ends when the file server gives it up (NFS: after"
        f" about 90 s). If it does not, and nothing runs on {host} any more: rm {folder.lock}"
    )


def _host(name: str) -> str:
    """The host of `process 7 on HOST`; nothing else has one."""
    words = name.split()
    return words[3] if len(words) == 4 and words[0] == "process" else ""


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
    if _host(name) != socket.gethostname():
        return False
    return not os.path.exists(f"/proc/{name.split()[1]}")
