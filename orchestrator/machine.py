"""Whether this machine has the room that a run needs."""

from __future__ import annotations

from orchestrator.disk import check_disk
from orchestrator.preflight import Prepared
from orchestrator.training_memory import check_training_memory


def check_machine(run: Prepared) -> None:
    """Refuses what does not fit on its disk, or a training that does not fit into its memory.

    Raises:
        DiskFull, ConfigError: with what is needed and what there is.
    """
    check_disk(run)
    check_training_memory(run)
