"""The refusal of a training that the memory of this host is too small for, before any work."""

from __future__ import annotations

from orchestrator import estimate
from orchestrator.engine import worker_budget
from orchestrator.errors import ConfigError
from orchestrator.estimate import human
from orchestrator.preflight import Prepared
from stages.unit import beside


def check_training_memory(run: Prepared) -> None:
    """Refuses ranks that need more memory than there is for each, where that is known: here, or by
    calibrate.memory_bytes. On the nodes of a cluster Ray refuses what fits on none.

    Raises:
        ConfigError: bytes per rank, needed and free.
    """
    config, executor = run.config.recover, run.config.executor
    if config is None or beside(run.folder.recover / "trained").exists():
        return
    elsewhere = executor.kind == "ray" and executor.address != "local"
    if (elsewhere or run.config.slurm is not None) and run.config.calibrate.memory_bytes is None:
        return
    offloads = config.deepspeed is not None and config.deepspeed.cpu_offload
    room, source = worker_budget(run, config.ranks, on_gpu=not offloads)
    needed = estimate.recover(run)
    if needed > room:
        raise ConfigError(
            f"the training needs about {human(needed)} of memory in each of {config.ranks}"
            f" rank(s), {human(room)} are there ({source})",
            "set recover.deepspeed.zero_stage=3 with more recover.ranks on more hosts, use"
            " recover.mode=router or less recover.micro_batch; if the memory is there, set"
            " calibrate.memory_bytes",
        )
