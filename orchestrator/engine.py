"""Which engine runs a model: the whole of it in a worker, or one decoder layer at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.support import reasons
from orchestrator import estimate
from orchestrator.compatibility import not_streamed
from orchestrator.estimate import human
from orchestrator.preflight import Prepared
from stages.calibrate.config import Engine
from stages.export.layout import FileLayout

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Choice:
    """An engine, the reason in words, and the memory of one of its workers."""

    engine: Engine
    why: str
    worker_bytes: int


def choose(run: Prepared) -> Choice:
    """What the config says; `auto`: resident wherever a worker can hold the model.

    Results do not depend on it, so a run may be resumed where the choice is another one.
    """
    asked, ranks = run.config.calibrate.engine, run.config.executor.ranks_per_replica
    if run.config.calibrate.backend == "autoep":
        why = "calibrate.backend=autoep needs it"
        return Choice("resident", why, estimate.calibrate(run, "resident"))
    if run.moe.checkpoint.config.get("is_encoder_decoder"):
        why = "an encoder-decoder is held whole by every worker"
        return Choice("resident", why, estimate.calibrate(run, "resident"))
    if asked != "auto":
        return Choice(asked, f"calibrate.engine={asked}", estimate.calibrate(run, asked))
    needed = estimate.calibrate(run, "resident")
    if (reason := not_streamed(run.moe)) is not None:
        return Choice("resident", f"it cannot be streamed: {reason}", needed)
    budget, source = worker_budget(run)
    engine: Engine = "resident" if needed <= budget else "streaming"
    fits = "fits" if needed <= budget else "does not fit"
    who = f"one of {ranks} ranks" if ranks > 1 else "a worker with the whole model"
    why = f"{who} needs about {human(needed)}, which {fits} into {human(budget)} ({source})"
    return Choice(engine, why, estimate.calibrate(run, engine))


def teacher(run: Prepared) -> Engine:
    """How the original is held that is learned from; `auto`: as it is to be observed."""
    assert run.config.recover is not None
    asked = run.config.recover.teacher.engine
    return choose(run).engine if asked == "auto" else asked


def evaluation(run: Prepared) -> Choice:
    """How models are held that are evaluated. The numbers do not depend on it."""
    models = (1 + len(run.variants)) * run.evaluation_domains
    budget = worker_budget(run, min(processes(run), max(models, 1)))
    why = not_streamed(run.moe)
    return _fitting(run, partial(estimate.evaluate, run), budget, why)


def gate(run: Prepared, layouts: Sequence[FileLayout]) -> Choice:
    """How the reload gate opens an output: always on the CPU."""
    budget = worker_budget(run, min(processes(run), len(run.variants)), on_gpu=False)
    why = reasons(run.moe.family).get("streaming")
    return _fitting(run, partial(estimate.export, run, layouts), budget, why)


def _fitting(
    run: Prepared,
    needed: Callable[[Engine], int],
    budget: tuple[int, str],
    cannot: str | None,
) -> Choice:
    """What `executor.engine` says; `auto`: whole models wherever a worker can hold one."""
    asked, whole, (room, source) = run.config.executor.engine, needed("resident"), budget
    if cannot is not None:
        return Choice("resident", f"it cannot be streamed: {cannot}", whole)
    if asked != "auto":
        return Choice(asked, f"executor.engine={asked}", needed(asked))
    engine: Engine = "resident" if whole <= room else "streaming"
    fits = "fits" if whole <= room else "does not fit"
    why = f"a whole model needs about {human(whole)}, which {fits} into {human(room)} ({source})"
    return Choice(engine, why, needed(engine))


def worker_budget(
    run: Prepared, workers: int | None = None, *, on_gpu: bool = True
) -> tuple[int, str]:
    """Memory that one worker may use, and where the number comes from.

    Args:
        workers: how many share a host's memory; None: as many as calibrate.
        on_gpu: whether the model lies on a GPU where workers have one.
    """
    config = run.config.calibrate
    if config.memory_bytes is not None:
        return config.memory_bytes, "calibrate.memory_bytes"
    found = gpu_memory() if on_gpu and run.config.executor.gpus_per_worker else None
    if found is not None:
        return found, "the memory of a GPU"
    free, workers = available_memory(), workers or worker_count(run)
    shared = f" / {workers} workers" if workers > 1 else ""
    return free // workers, f"{human(free)} of free memory{shared}"


def worker_count(run: Prepared) -> int:
    """Processes that hold a model, or a part of one, at the same time.

    There are never more workers, or replicas of several ranks, than shards.
    """
    executor, shards = run.config.executor, run.config.calibrate.shards
    if executor.kind == "local":
        return 1
    ranks = executor.ranks_per_replica
    return min(max(processes(run) // ranks, 1), shards) * ranks


def processes(run: Prepared) -> int:
    """Workers of a run."""
    executor = run.config.executor
    return 1 if executor.kind == "local" else executor.workers or os.cpu_count() or 1


def gpu_memory() -> int | None:
    """Bytes of the first GPU of this host, on one of which a worker's model lies; None: no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def available_memory() -> int:
    """Free bytes of this host, or of the container that it runs in."""
    with suppress(OSError, ValueError, StopIteration):
        lines = _MEMINFO.read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
        return min(free, _container_memory(free))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_memory(otherwise: int) -> int:
    """What the limit of a container (cgroup v2) leaves; there may be none."""
    with suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        return max(limit - int((_CGROUP / "memory.current").read_text()), 0)
    return otherwise
