"""What a run needs on disk, and the refusal of a disk that is too small, before any work."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from models.errors import DiskFull, StorageError
from orchestrator import engine, estimate, samples
from orchestrator.preflight import Prepared, expected_layouts, student_layouts
from stages.export.stage import is_companion

_ROOM = "free space, move `run_dir`"
_STREAMS = "raise calibrate.shards, lower executor.workers, or set calibrate.engine=resident"


@dataclass(frozen=True)
class Need:
    """What lies in the run folder at one time of a run. Bytes are upper bounds."""

    when: str
    size: int
    remedy: str


def needs(run: Prepared) -> list[Need]:
    """The times at which most is on disk: with scratch files beside what stays.

    Not counted: markers, logs, events and the report, a few megabytes in all; and copies of layer
    files where the disk has no hard links, see `copied_bytes`.
    """
    observed, models = observed_bytes(run), model_bytes(run)
    config, moe, fetched = run.config.calibrate, run.moe, fetched_bytes(run)
    scratch = engine.worker_count(run) * samples.scratch_bytes(config, moe)
    hidden = hidden_bytes(run)
    fewer = "or lower executor.workers or calibrate.sample.tokens"
    refit = "or set refit.preset=parallel, or lower calibrate.data.tokens"
    taught = "or lower recover.teacher.top"
    baselines = "or drop baselines with evaluate.baselines=[]"
    written = models + trained_bytes(run) + measured_bytes(run)
    found = [
        ("when all is written", written, baselines),
        ("while outputs are evaluated by layers", written + evaluation_bytes(run), baselines),
        (f"while the hidden states of {shards_at_once(run)} shards stream", hidden, _STREAMS),
        ("while all experts are evaluated", scratch, fewer),
        ("while the output is trained", models + trained_bytes(run) + training_bytes(run), taught),
        ("while layers are refitted behind reduced ones", models + carried_bytes(run), refit),
    ]
    return [
        Need(when, fetched + observed + more, f"{_ROOM}, {remedy}") for when, more, remedy in found
    ]


def peak_bytes(run: Prepared) -> int:
    """The most that lies in the run folder at any time."""
    return max(need.size for need in needs(run))


def disk_bytes(run: Prepared) -> int:
    """What a run has written at its end, baselines included."""
    kept = model_bytes(run) + trained_bytes(run)
    return observed_bytes(run) + kept + measured_bytes(run)


def observed_bytes(run: Prepared) -> int:
    """What stays of calibration: tokens, statistics of every shard and their sum, and samples."""
    config = run.config.calibrate
    if config.statistics is not None:
        return estimate.statistics_bytes(run)
    # Text lies domain by domain: one shard more sees both sides of every border.
    tables = config.shards + 2 * run.calibration_domains
    sampled = samples.disk_bytes(config, run.moe, run.calibration_domains)
    return 4 * config.data.tokens + tables * estimate.statistics_bytes(run) + sampled


def model_bytes(run: Prepared) -> int:
    """Every variant's weights, and what is copied beside them."""
    folder = run.moe.checkpoint.folder
    beside = sum(path.stat().st_size for path in folder.iterdir() if is_companion(path))
    return weight_bytes(run) + beside * len(run.variants)


def weight_bytes(run: Prepared) -> int:
    """Every variant's weight files."""
    layouts = (each for variant in run.variants for each in expected_layouts(variant, run.moe))
    return sum(layout.file_bytes for layout in layouts)


def measured_bytes(run: Prepared) -> int:
    """Held-out tokens and the original's distributions."""
    evaluate = run.config.evaluate
    if evaluate is None:
        return 0
    vocabulary = int(run.moe.checkpoint.config["vocab_size"])
    return (
        run.evaluation_domains * evaluate.kl_positions * vocabulary * 4 + evaluate.data.tokens * 4
    )


def carried_bytes(run: Prepared) -> int:
    """What is carried while layers are refitted behind reduced ones: two residual streams of the
    block before, two of this one and one within it, and the targets of both blocks."""
    refit, moe = run.config.refit, run.moe
    if refit.together is None or not refit.applies(run.variants[0].method.narrows):
        return 0
    # Inputs and targets in float32; ids of eight bytes, gates of four.
    config = run.config.calibrate
    tokens = min(config.sample.count, config.data.tokens)
    targets = tokens * (8 * moe.hidden_size + 12 * moe.top_k)
    layers = min(2 * refit.together, len(moe.layers))
    return 5 * estimate.stream_bytes(run) + layers * targets


def hidden_bytes(run: Prepared) -> int:
    """Hidden states of all shards that are streamed at the same time; 0 when none is."""
    if run.config.calibrate.statistics is not None:
        return 0
    if engine.choose(run).engine != "streaming":
        return 0
    return shards_at_once(run) * estimate.hidden_bytes(run)


def evaluation_bytes(run: Prepared) -> int:
    """Hidden states of all domains that models are streamed over at the same time; else 0."""
    if run.config.evaluate is None or engine.evaluation(run).engine != "streaming":
        return 0
    at_once = min(engine.processes(run), run.evaluation_domains)
    return at_once * estimate.evaluation_bytes(run)


def shards_at_once(run: Prepared) -> int:
    """Every process streams a shard of its own."""
    return min(engine.worker_count(run), run.config.calibrate.shards)


def trained_bytes(run: Prepared) -> int:
    """The trained output, beside the one before training, and what has all rows of S."""
    if run.config.recover is None:
        return 0
    trained = sum(each.file_bytes for each in expected_layouts(run.variants[0], run.moe))
    if run.config.pruning is None:
        return trained
    return trained + sum(each.file_bytes for each in student_layouts(run))


def training_bytes(run: Prepared) -> int:
    """The teacher's predictions, text, and three states: two that are kept and one that is being
    written."""
    config = run.config.recover
    if config is None:
        return 0
    text = 4 * (config.data or run.config.calibrate.data).tokens
    return estimate.taught_bytes(run) + 3 * estimate.state_bytes(run) + text


def check_disk(run: Prepared) -> None:
    """Refuses a run that would fill the disk at some time.

    A run that resumes is only asked for its hidden states: what it has written is not written anew.

    Raises:
        DiskFull: bytes needed and free.
    """
    free = _free(run.folder.root)
    _check_cache(run)
    if run.resumes:
        _check_streams(run, free)
        return
    worst = max(needs(run), key=lambda need: need.size)
    if worst.size <= free:
        copied = copied_bytes(run, free - worst.size)
        worst = Need(
            "with a copy of each layer file, since it has no hard links",
            worst.size + copied,
            "free space, or move `run_dir`",
        )
    if worst.size > free:
        raise DiskFull(
            f"the run needs up to {worst.size:,} bytes in {run.folder.root} {worst.when};"
            f" {free:,} are free",
            worst.remedy,
        )


def _check_streams(run: Prepared, free: int) -> None:
    hidden = 0 if run.folder.statistics.exists() else hidden_bytes(run)
    if hidden > free:
        raise DiskFull(
            f"streaming keeps the hidden states of {shards_at_once(run)} shards at a time,"
            f" {hidden:,} bytes in {run.folder.root}; {free:,} are free",
            f"{_ROOM}, {_STREAMS}",
        )


def copied_bytes(run: Prepared, left: int) -> int:
    """Weights that are written twice, since the output cannot be hard links to the layer files.

    The disk is asked (with a file that is gone at once) only where the copies would not fit in
    the bytes that are `left`.
    """
    size = weight_bytes(run)
    if size <= left:
        return 0
    place = _existing(run.folder.root)
    with suppress(OSError), TemporaryDirectory(prefix=".coalesce-", dir=place) as name:
        file = Path(name) / "file"
        file.touch()
        os.link(file, file.with_name("link"))
        return 0
    return size


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
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
