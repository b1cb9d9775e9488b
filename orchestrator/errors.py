"""All errors that a user meets, and the exit code of each kind.

UserError                exit 2: mend the input; nothing half-written is left
├── ConfigError          a recipe, key or value
├── RunFolderError       the run folder is not ours, or belongs to other inputs
├── CheckpointError      models.errors: a file or tensor of the model
├── DiskFull             models.errors
├── StorageError         models.errors; its StoreSilent exits 75, since a later try may succeed
├── UrlError             models.remote.urls
├── DataError, BudgetError, StatisticsError, StaleUnit, ReplicaError, GateError
│                        stages.errors
InfrastructureError      exit 75 (try again later): cluster.errors; finished units are kept
Interrupted              exit 130, 143 or 75: orchestrator.interrupt; the run was asked to stop
anything else            exit 1: a bug
"""

from __future__ import annotations

from cluster.errors import InfrastructureError
from models.errors import StoreSilent, UserError
from orchestrator.interrupt import EXIT_AGAIN, Interrupted

EXIT_USER = 2
EXIT_RETRY = EXIT_AGAIN


class ConfigError(UserError):
    """A config that cannot be read, or a key or value in it that is not valid."""


class RunFolderError(UserError):
    """A run folder that holds something else, or another run."""


def exit_code(error: BaseException) -> int:
    """The process exit code for an error."""
    if isinstance(error, StoreSilent):
        return EXIT_RETRY
    if isinstance(error, UserError):
        return EXIT_USER
    if isinstance(error, Interrupted):
        return error.exit_code
    return EXIT_RETRY if isinstance(error, InfrastructureError) else 1
