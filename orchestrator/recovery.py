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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.executor import Replicas
from models.atomic import text_digest
from models.checkpoint import Checkpoint
from orchestrator import engine, estimate
from orchestrator.events import EventLog
from orchestrator.preflight import Prepared
from orchestrator.run_folder import RECOVERED
from stages.compress.layer import applies
from stages.corpus.stage import CorpusUnit, count_blocks, data_digest, tokenizer_digest
from stages.errors import Paused
from stages.export import stage as export
from stages.export.layout import file_layouts
from stages.export.stage import ExportUnit, target_name
from stages.recover import stage as recover
from stages.recover.config import RecoverConfig
from stages.recover.progress import read_course
from stages.recover.stage import TeachUnit, TrainUnit
from stages.transform.stage import TransformUnit
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
    pruning = run.config.pruning
    more = [] if pruning is None else [pruning.model_dump(mode="json")]
    return text_digest([config_of(run).arithmetic, text, *more])


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


def starting(run: Prepared, units: Sequence[TransformUnit]) -> list[TransformUnit]:
    """The units; where rows of S go in training, they write layers with all of them as well."""
    if run.config.pruning is None:
        return list(units)
    return [
        unit if unit.decomposes is None else replace(unit, start=start_file(run, unit.layer))
        for unit in units
    ]


def start_file(run: Prepared, layer: int | None) -> Path:
    """A layer with all rows of S."""
    assert layer is not None
    return run.folder.start / f"start-{layer:05d}.safetensors"


def student_unit(run: Prepared, before: ExportUnit) -> ExportUnit:
    """The folder that training starts from: what `before` wrote, or that with all rows of S."""
    if run.config.pruning is None:
        return before
    config = before.config.all_rows
    pairs = zip(before.layouts, before.files, strict=True)
    decided = {each.layer for each in before.decisions}
    return replace(
        before,
        layouts=tuple(file_layouts(run.moe, before.decisions, config)),
        files=tuple(
            start_file(run, layout.layer)
            if layout.layer in decided and applies(config.compress, layout.layer)
            else path
            for layout, path in pairs
        ),
        config=config,
        output=run.folder.start / "student",
        variant="start",
    )


def train_unit(
    run: Prepared, before: ExportUnit, taught: Sequence[TeachUnit], student: ExportUnit
) -> TrainUnit:
    """The training of the checkpoint that `student` is, in files like those that `before` wrote."""
    names = [target_name(index, len(before.files)) for index in range(len(before.files))]
    folder = run.folder.layers(RECOVERED)
    # A student of its own does not stay, so that it is known by what it is made of.
    whole = read_digests(before.marker)
    own = whole if student is before else text_digest([whole, student.fingerprint])
    return TrainUnit(
        student=student.output,
        needs_code=before.needs_code,
        corpus=run.folder.recover_tokens,
        taught=tuple(taught),
        config=config_of(run),
        files=tuple(zip(names, (folder / path.name for path in before.files), strict=True)),
        folder=run.folder.recover,
        inputs=(
            ("corpus", read_digests(beside(run.folder.recover_tokens))),
            ("student", own),
            ("threads", str(run.config.executor.threads_per_unit)),
        ),
        prune=run.config.pruning,
    )


def export_unit(run: Prepared, before: ExportUnit, trained: TrainUnit, done: Done) -> ExportUnit:
    """The same folder with the trained files, and the rows of S that training left."""
    digest = read_digests(trained.marker)
    if (rows := done.result.get("rows")) is not None:
        numbers = {int(layer): each for layer, each in rows.items()}
        assert before.config.compress is not None
        compress = before.config.compress.model_copy(update={"numbers": numbers})
        config = before.config.model_copy(update={"compress": compress})
        layouts = tuple(file_layouts(run.moe, before.decisions, config))
        before = replace(before, config=config, layouts=layouts)
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
    taught, student = teach_units(run), student_unit(run, before)
    unit = train_unit(run, before, taught, student)
    if finished(unit) is None:
        _prepare(run, scheduler, taught, None if student is before else student)
    with _watched(run, unit, scheduler, events):
        try:
            memory = estimate.recover(run)
            (done,) = scheduler.run_model(
                "recover", [unit], recover.make_trainer, memory, replicas(run)
            )
        except Paused:
            scheduler.stopped()
            raise
    shutil.rmtree(run.folder.taught, ignore_errors=True)
    for state in run.folder.recover.glob("state-*.safetensors*"):
        state.unlink()
    if student is not before:
        shutil.rmtree(student.output, ignore_errors=True)
        student.marker.unlink(missing_ok=True)
    after = export_unit(run, before, unit, done)
    memory = estimate.export(run, before.layouts, before.engine)
    scheduler.run("export", [after], export.run_one, memory)
    return after


def _prepare(
    run: Prepared, scheduler: Scheduler, taught: Sequence[TeachUnit], student: ExportUnit | None
) -> None:
    """The teacher's predictions, where one is asked, and a student of its own, where there is."""
    if taught:
        memory = estimate.teach(run, engine.teacher(run))
        scheduler.run_model("teach", taught, recover.make_asker, memory)
    if student is not None:
        memory = estimate.export(run, student.layouts, student.engine)
        scheduler.run("export", [student], export.run_one, memory)


def trained_variant(run: Prepared, trained: ExportUnit) -> Prepared:
    """The run as its result is: with the rows of S that training left."""
    main = replace(run.variants[0], export=trained.config)
    return replace(run, variants=(main, *run.variants[1:]))


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
