"""What a run needs on disk, and the refusal of a disk that is too small, before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

from models.errors import DiskFull, StorageError
from orchestrator import engine, estimate, samples
from orchestrator.preflight import Prepared, expected_layouts


def peak_bytes(run: Prepared) -> int:
    """Hidden states and scratch files are gone before the first output file is written."""
    config, moe = run.config.calibrate, run.moe
    sampled = samples.disk_bytes(config, moe, run.calibration_domains)
    scratch = engine.worker_count(run) * samples.scratch_bytes(config, moe)
    written = disk_bytes(run) + stream_bytes(run)
    return fetched_bytes(run) + max(written, sampled + max(scratch, hidden_bytes(run)))


def stream_bytes(run: Prepared) -> int:
    """Residual streams while layers are refitted behind reduced ones: two of the block before, two
    of this one and one within it."""
    refit = run.config.refit
    if refit.together is None or not refit.applies(run.variants[0].method.narrows):
        return 0
    return 5 * estimate.stream_bytes(run)


def hidden_bytes(run: Prepared) -> int:
    """Hidden states of all shards that are streamed at the same time; 0 when none is."""
    if run.config.calibrate.statistics is not None:
        return 0
    if engine.choose(run).engine != "streaming":
        return 0
    return shards_at_once(run) * estimate.hidden_bytes(run)


def shards_at_once(run: Prepared) -> int:
    """Every process streams a shard of its own."""
    return min(engine.worker_count(run), run.config.calibrate.shards)


def disk_bytes(run: Prepared) -> int:
    """What stays of a run: every variant's files, samples, distributions and blocks."""
    files = sum(
        layout.file_bytes
        for variant in run.variants
        for layout in expected_layouts(variant, run.moe)
    )
    files += samples.disk_bytes(run.config.calibrate, run.moe, run.calibration_domains)
    files += recover_bytes(run)
    evaluate = run.config.evaluate
    if evaluate is None:
        return files
    vocabulary = int(run.moe.checkpoint.config["vocab_size"])
    reference = run.evaluation_domains * evaluate.kl_positions * vocabulary * 4
    return files + reference + evaluate.data.tokens * 4


def recover_bytes(run: Prepared) -> int:
    """Trained files, the teacher's predictions, text, and three states: two that are kept and one
    that is being written."""
    config = run.config.recover
    if config is None:
        return 0
    trained = sum(each.file_bytes for each in expected_layouts(run.variants[0], run.moe))
    text = 4 * (config.data or run.config.calibrate.data).tokens
    return trained + estimate.taught_bytes(run) + 3 * estimate.state_bytes(run) + text


def check_disk(run: Prepared) -> None:
    """Refuses a run that would fill the disk.

    Raises:
        DiskFull: bytes needed and free.
    """
    needed = disk_bytes(run) + stream_bytes(run) + fetched_bytes(run)
    free = _free(run.folder.root)
    _check_cache(run)
    if needed > free and not run.resumes:
        raise DiskFull(
            f"the run will write {needed:,} bytes to {run.folder.root}, {free:,} are free",
            "free space, move `run_dir`, or drop baselines with evaluate.baselines=[]",
        )
    hidden = 0 if run.folder.statistics.exists() else hidden_bytes(run)
    if hidden > free:
        raise DiskFull(
            f"streaming keeps the hidden states of {shards_at_once(run)} shards at a time,"
            f" {hidden:,} bytes in {run.folder.root}; {free:,} are free",
            "raise calibrate.shards, lower executor.workers, move `run_dir`, or set"
            " calibrate.engine=resident",
        )


def fetched_bytes(run: Prepared) -> int:
    """Weights that will be fetched into the run folder: those of a URL without a cache."""
    origin = run.moe.checkpoint.origin
    if origin is None or origin.cache is not None:
        return 0
    return origin.missing_bytes(run.moe.checkpoint.files)


def cache_bytes(run: Prepared) -> int:
    """Weights that this node's cache lacks, if one node fetches all; 0 without a cache."""
    origin, checkpoint = run.moe.checkpoint.origin, run.moe.checkpoint
    if origin is None or origin.cache is None:
        return 0
    try:
        return origin.missing_bytes(checkpoint.files)
    except StorageError:  # the login node of a cluster has no cache
        return checkpoint.file_bytes


def _check_cache(run: Prepared) -> None:
    origin, needed = run.moe.checkpoint.origin, cache_bytes(run)
    if origin is None or not needed:
        return
    try:
        free = _free(origin.place)
    except StorageError:
        return
    if needed > free:
        raise DiskFull(
            f"the cache {origin.place} lacks {needed:,} bytes of the checkpoint, {free:,} are free",
            "set cache.dir to a larger disk of the nodes, or delete what older runs left there",
        )


def _free(folder: Path) -> int:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
