"""What Ray says of a worker that is gone, in a line or two."""

from __future__ import annotations

import ray.exceptions as failures

_LOW = "running low on memory"


def short_of_memory(error: BaseException | None) -> bool:
    """Whether Ray's memory monitor ended the worker; of an actor's end it only tells in words."""
    return isinstance(error, failures.OutOfMemoryError) or _LOW in str(error)


def in_short(error: BaseException | None) -> str:
    """What Ray says; of memory, one line of its fifty, and what to do."""
    if not short_of_memory(error):
        # Ray goes on with lists of processes and their command lines, which may hold secrets.
        return " ".join(line.strip() for line in str(error).splitlines()[:2])
    line = next((line for line in str(error).splitlines() if _LOW in line), _LOW)
    return f"{line.strip()}; fewer `executor.workers` need less at a time"
