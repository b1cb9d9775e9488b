"""Recovery of one folder in one process, without a run around it: for programs and experiments."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.atomic import attempt, quick_digest, text_digest, write_json
from models.checkpoint import INDEX, Checkpoint
from stages.errors import Paused, TrainingError
from stages.recover.config import PruneConfig, RecoverConfig
from stages.recover.cut import Cut, cut_student
from stages.recover.trainer import Trained, Training, train
from stages.recover.written import on_disk, overwriting, write_files


def recover(
    student: Path,
    target: Path,
    config: RecoverConfig,
    corpus: Path,
    taught: Sequence[Path] = (),
    *,
    scratch: Path | None = None,
    prune: PruneConfig | None = None,
) -> dict[str, Any]:
    """Trains a checkpoint folder and writes the result as another folder of the same form.

    Args:
        student: native, mapped, or mapped with U V + S; it is only read.
        target: must not exist.
        corpus: blocks of tokens (`stages.corpus.stage`).
        taught: what the original says along them (`stages.recover.teach.teach`); none: alpha must
            be 0, and cross-entropy alone is minimised.
        scratch: folder of states; a call with the same arguments goes on from the newest. None:
            beside the target, and gone afterwards.
        prune: rows of S go by sensitivity while it is trained; the student is then a mapped
            checkpoint with U V and S of all rows, or of those to choose from.

    Returns:
        steps, and experts that never got a gradient, by layer.
    """
    if config.alpha and not taught:
        raise TrainingError(
            f"recover.alpha is {config.alpha:g} and there is no teacher", "teach first, or alpha=0"
        )
    folder = scratch or target.with_name(f".{target.name}.states.tmp")
    checkpoint = Checkpoint.open(student)
    training = Training(
        student=student,
        needs_code="auto_map" in checkpoint.config,
        corpus=corpus,
        taught=tuple(taught),
        config=config,
        folder=folder,
        fingerprint=fingerprint_of(checkpoint, config, corpus, taught, prune),
        prune=prune,
    )
    done = train(training)
    if not done.finished:
        raise Paused(f"asked to pause after step {done.step}", "call again to go on")
    write_folder(checkpoint, done, target)
    if scratch is None:
        shutil.rmtree(folder, ignore_errors=True)
    return {"steps": done.step, "untrained": done.untrained}


def fingerprint_of(
    student: Checkpoint,
    config: RecoverConfig,
    corpus: Path,
    taught: Sequence[Path],
    prune: PruneConfig | None = None,
) -> str:
    """Of everything that a state depends on; not of ranks, nor of where states are cut."""
    return text_digest(
        [
            [student.identity(file) for file in student.files],
            config.arithmetic,
            [quick_digest(path) for path in (corpus, *taught)],
            None if prune is None else prune.model_dump(mode="json"),
        ]
    )


def write_folder(student: Checkpoint, done: Trained, target: Path) -> None:
    """The student's folder with the trained values, whole or not at all."""
    staging = target.with_name(f".{target.name}.{attempt()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        targets = {file: staging / file for file in student.files}
        cut = cut_student(student, done.values, done.kept) if done.kept else None
        if cut is None:
            with overwriting(student, targets) as put:
                for values in done.layers():
                    put(on_disk(done.model, values, student))
        else:
            trained = on_disk(done.model, done.values, student)
            write_files(student, trained | cut.tensors, targets, cut.gone)
        for path in sorted(student.folder.iterdir()):
            if path.is_file() and path.name not in targets:
                shutil.copyfile(path, staging / path.name)
        if cut is not None:
            write_json(staging / "config.json", cut.config)
            _write_index(staging, student, cut)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_index(folder: Path, student: Checkpoint, cut: Cut) -> None:
    """The index of a folder with several files, without what is gone and with the new size."""
    if not (student.folder / INDEX).exists():
        return
    kept = {n: info.file for n, info in student.tensors.items() if n not in cut.gone}
    sizes = {n: cut.tensors[n].nbytes for n in cut.tensors}
    total = sum(sizes.get(name, student.tensors[name].nbytes) for name in kept)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": kept})
