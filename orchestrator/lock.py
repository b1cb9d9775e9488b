"""One process at a time works on a run."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import RunFolderError
from orchestrator.run_folder import RunFolder


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
            file.seek(0)
            raise RunFolderError(
                f"another process works on {folder.root}: {file.read().strip()}",
                f"wait for it (`coalesce status {folder.root}`), or end it",
            ) from error
        except OSError:
            pass  # a file system without locks: two runs at once are then the user's care
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
