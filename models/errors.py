"""What can be wrong with a checkpoint, and the root of every error a user can mend.

UserError                 cause, numbers, remedy; never retried
├── CheckpointError       a file or tensor of a checkpoint is not what it must be
│   ├── UnknownFamily     no adapter for this model type
│   └── UnsupportedFeature  this model type cannot have what was asked for
├── StorageError          an object store lacks, refuses or changed something
│   └── StoreSilent       it does not answer: try again later
└── DiskFull              a write ran out of space

`stages.errors` and `orchestrator.errors` add their own branches.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input. `cause` holds the facts and numbers, `remedy` what to change."""

    def __init__(self, cause: str, remedy: str = "") -> None:
        # Both go to Exception.args, so that the error survives pickling between Ray workers.
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}\n  -> {self.remedy}" if self.remedy else self.cause


class CheckpointError(UserError):
    """A file or tensor of a checkpoint is missing, damaged or of the wrong kind."""


class UnknownFamily(CheckpointError):
    """No adapter knows this model type."""


class UnsupportedFeature(CheckpointError):
    """The family is known, and what was asked for does not exist for it."""


class StorageError(UserError):
    """A store behind a URL lacks, refuses or has changed what is needed."""


class StoreSilent(StorageError):
    """A store behind a URL does not answer; the same command may succeed later."""


class DiskFull(UserError):
    """A write ran out of space; the unfinished file was removed."""
