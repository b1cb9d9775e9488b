"""A command on a Ray cluster that somebody else started, through Ray's job server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_POLL_SECONDS = 1.0
# A job server that restarts comes back within this time, or the job is lost with it.
_SILENCE_SECONDS = 120.0


class JobError(RuntimeError):
    """The job server is not there, or refuses the job."""


@dataclass(frozen=True)
class JobRequest:
    """What the job server is asked to run."""

    entrypoint: str
    # Copied to the cluster; the command starts in it.
    working_dir: Path
    # Python packages that are copied to the cluster as well.
    packages: Sequence[Path] = ()
    runtime_env: dict[str, Any] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, Any]:
        """Ray's runtime environment of the job."""
        own: dict[str, Any] = {"working_dir": str(self.working_dir)}
        if self.packages:
            own["py_modules"] = [str(path) for path in self.packages]
        return self.runtime_env | own


@dataclass(frozen=True)
class Ended:
    """How a job ended; `code` is 0 for success and for nothing else."""

    status: str
    code: int
    message: str


class RayJobs:
    """A job server."""

    def __init__(self, address: str) -> None:
        """`address`: http://host:8265.

        Raises:
            JobError: nothing answers there, or Ray's client is not installed.
        """
        try:
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(address)
        except (ImportError, RuntimeError, ConnectionError, ValueError) as error:
            raise JobError(f"no Ray job server at {address}: {_first_line(error)}") from error

    def submit(self, request: JobRequest) -> str:
        """Sends a job; returns its name.

        Raises:
            JobError: the server refused it.
        """
        try:
            return str(
                self._client.submit_job(
                    entrypoint=request.entrypoint, runtime_env=request.environment
                )
            )
        except (RuntimeError, ConnectionError, ValueError) as error:
            raise JobError(f"the job was refused: {_first_line(error)}") from error

    def follow(self, job: str, show: Callable[[str], object]) -> Ended:
        """Hands the job's output to `show` as it comes, and says how the job ended.

        Raises:
            JobError: the server did not answer for two minutes.
        """
        shown, heard = 0, time.monotonic()
        while True:
            with suppress(RuntimeError, ConnectionError, OSError):
                shown = asyncio.run(self._tail(job, show, shown))
            try:
                ended = self.ended(job)
                heard = time.monotonic()
            except (RuntimeError, ConnectionError, OSError) as error:
                ended = None
                if time.monotonic() - heard > _SILENCE_SECONDS:
                    raise JobError(f"the job server is gone: {_first_line(error)}") from error
            if ended is not None:
                return ended
            time.sleep(_POLL_SECONDS)

    def ended(self, job: str) -> Ended | None:
        """How a job ended, or None while it has not."""
        found = self._client.get_job_info(job)
        status = str(found.status.value)
        if not found.status.is_terminal():
            return None
        # A job that was stopped, or could not be started, has no exit code of its own.
        code = 0 if status == "SUCCEEDED" else (found.driver_exit_code or 1)
        return Ended(status, code if 0 <= code < 256 else 1, found.message or "")

    async def _tail(self, job: str, show: Callable[[str], object], shown: int) -> int:
        """Characters shown in all: the server always begins at the beginning."""
        seen = 0
        async for text in self._client.tail_job_logs(job):
            seen += len(text)
            if seen > shown:
                show(text[-(seen - shown) :])
                shown = seen
        return shown


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
