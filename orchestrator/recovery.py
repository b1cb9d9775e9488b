"""The recovery of the main variant: text, teacher, training, and the checkpoint that comes of it.

What the training needs on the way (the teacher's predictions, states) is gone afterwards; the
course of the loss stays in `recover/course.jsonl`.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.executor import Replicas
from models.atomic import text_digest
from models.checkpoint import Checkpoint
from orchestrator import engine, estimate
from orchestrator.events import EventLog
from orchestrator.preflight import Prepared
from orchestrator.run_folder import RECOVERED
from stages.corpus.stage import CorpusUnit, count_blocks, data_digest, tokenizer_digest
from stages.errors import Paused
from stages.export import stage as export
from stages.export.stage import ExportUnit, target_name
from stages.recover import stage as recover
from stages.recover.config import RecoverConfig
from stages.recover.progress import read_course
from stages.recover.stage import TeachUnit, TrainUnit
from stages.unit import Done, beside, finished, read_digests
from stages.verify.stage import identity

if TYPE_CHECKING:
    from orchestrator.scheduler import Scheduler

_LOOK_SECONDS = 1.0


def config_of(run: Prepared) -> RecoverConfig:
    """The section, which must be there."""
    assert run.config.recover is not None
    return run.config.recover


def corpus_unit(run: Prepared) -> CorpusUnit:
    """The text that is trained on; documents that are evaluated count as in calibration text."""
    config, evaluate = run.config, run.config.evaluate
    return CorpusUnit(
        "corpus/recover",
        config_of(run).data or config.calibrate.data,
        run.tokenizer,
        run.folder.recover_tokens,
        None if evaluate is None else evaluate.data,
        config.calibrate.dedup,
        run.folder.fetched,
    )


def identity_of(run: Prepared) -> str:
    """What trained values follow from, beside what the reduced ones follow from."""
    text = data_digest(corpus_unit(run).config, run.folder.fetched)
    return text_digest([config_of(run).arithmetic, text])


def teach_units(run: Prepared) -> list[TeachUnit]:
    """Parts of the teacher's predictions, once the text is tokenised."""
    config, folder = config_of(run), run.folder
    other = config.teacher.path
    model = run.moe.checkpoint.folder if other is None else other.absolute()
    inputs = {
        "model": run.model if other is None else identity(Checkpoint.open(other, allow_links=True)),
        "tokenizer": tokenizer_digest(run.tokenizer),
        "corpus": read_digests(beside(folder.recover_tokens)),
        "threads": str(run.config.executor.threads_per_unit),
    }
    return recover.teach_units(
        config,
        blocks=count_blocks(folder.recover_tokens),
        model=model,
        corpus=folder.recover_tokens,
        folder=folder.taught,
        inputs=inputs,
        engine=engine.teacher(run),
    )


def train_unit(run: Prepared, before: ExportUnit, taught: Sequence[TeachUnit]) -> TrainUnit:
    """The training of the checkpoint that `before` wrote."""
    names = [target_name(index, len(before.files)) for index in range(len(before.files))]
    folder = run.folder.layers(RECOVERED)
    return TrainUnit(
        student=before.output,
        needs_code=before.needs_code,
        corpus=run.folder.recover_tokens,
        taught=tuple(taught),
        config=config_of(run),
        files=tuple(zip(names, (folder / path.name for path in before.files), strict=True)),
        folder=run.folder.recover,
        inputs=(
            ("corpus", read_digests(beside(run.folder.recover_tokens))),
            ("student", read_digests(before.marker)),
            ("threads", str(run.config.executor.threads_per_unit)),
        ),
    )


def export_unit(run: Prepared, before: ExportUnit, trained: TrainUnit) -> ExportUnit:
    """The same folder with the trained files."""
    digest = read_digests(trained.marker)
    return replace(
        before,
        files=tuple(trained.outputs),
        digests=(digest,),
        output=run.folder.output(RECOVERED),
        variant=RECOVERED,
    )


def replicas(run: Prepared) -> Replicas[TrainUnit, Done] | None:
    """How the training is spread over ranks; None: one process of its own."""
    config, executor = config_of(run), run.config.executor
    if not config.dealt_out:
        return None
    return Replicas(config.ranks, recover.make_rank, executor.placement, executor.rank_timeout_s)


def recovered(
    run: Prepared, scheduler: Scheduler, events: EventLog, before: ExportUnit
) -> ExportUnit:
    """Trains what `before` wrote, and puts the result through the same gate.

    Raises:
        Interrupted: the run was asked to stop, and the training left a state.
    """
    taught = teach_units(run)
    unit = train_unit(run, before, taught)
    if finished(unit) is None and taught:
        scheduler.run_model(
            "teach", taught, recover.make_asker, estimate.teach(run, engine.teacher(run))
        )
    with _watched(run, unit, scheduler, events):
        try:
            memory = estimate.recover(run)
            scheduler.run_model("recover", [unit], recover.make_trainer, memory, replicas(run))
        except Paused:
            scheduler.stopped()
            raise
    shutil.rmtree(run.folder.taught, ignore_errors=True)
    for state in run.folder.recover.glob("state-*.safetensors*"):
        state.unlink()
    after = export_unit(run, before, unit)
    memory = estimate.export(run, before.layouts, before.engine)
    scheduler.run("export", [after], export.run_one, memory)
    return after


@contextmanager
def _watched(
    run: Prepared, unit: TrainUnit, scheduler: Scheduler, events: EventLog
) -> Iterator[None]:
    """While a unit trains: what it says becomes events, and a wish to stop reaches it as a file."""
    stop = unit.training.stop
    stop.unlink(missing_ok=True)
    ended = threading.Event()

    def look() -> None:
        told = 0
        while not ended.wait(_LOOK_SECONDS):
            if scheduler.stopping and not stop.exists():
                stop.parent.mkdir(parents=True, exist_ok=True)
                stop.touch()
            told = _tell(unit, events, told)

    thread = threading.Thread(target=look, name="training", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        stop.unlink(missing_ok=True)


def _tell(unit: TrainUnit, events: EventLog, told: int) -> int:
    """One event for the newest step, if it is new."""
    course = read_course(unit.training.course)
    if not course or course[-1]["step"] == told:
        return told
    recent = course[-20:]
    each = sum(line["seconds"] for line in recent) / len(recent)
    last: dict[str, Any] = course[-1]
    events.emit(
        "training",
        stage="recover",
        unit=unit.name,
        step=last["step"],
        steps=unit.config.steps,
        loss=round(sum(line["loss"] for line in recent) / len(recent), 4),
        eta_seconds=round(each * (unit.config.steps - last["step"]), 1),
        tokens_per_second=round(
            sum(line["tokens"] for line in recent) / max(each * len(recent), 1e-9)
        ),
    )
    return int(last["step"])


def untrained_lines(done: Sequence[Done]) -> list[str]:
    """Experts that never got a gradient, for the report's warnings."""
    from stages.calibrate.coverage import shown

    found = [each.result.get("untrained", {}) for each in done]
    return [
        f"layer {layer}: experts {shown(experts)} never got a gradient in the recovery: no token"
        " that was trained on was sent to them (more or other text in recover.data may be)"
        for silent in found
        for layer, experts in sorted(silent.items(), key=lambda pair: int(pair[0]))
    ]
