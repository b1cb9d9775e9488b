"""Units of the recovery: parts of the teacher's predictions, and the training.

Several ranks run the training together: rank 0 has the unit and writes, the others help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.atomic import text_digest
from models.checkpoint import Checkpoint
from stages.calibrate.config import Engine
from stages.corpus.stage import read_blocks
from stages.errors import Paused
from stages.recover.config import VERSION, PruneConfig, RecoverConfig
from stages.recover.cut import cut_student
from stages.recover.progress import read_course
from stages.recover.ranks import Ranks
from stages.recover.teach import open_original, say
from stages.recover.trainer import Trained, Training, train
from stages.recover.written import on_disk, overwriting, write_files
from stages.unit import Done, Fingerprint, OneFile, beside, execute, finished

if TYPE_CHECKING:
    from cluster.expert_parallel import ExpertGroup


@dataclass(frozen=True)
class TeachUnit(OneFile):
    """What the original says along blocks `start` to `stop` of the text."""

    index: int
    start: int
    stop: int
    model: Path
    corpus: Path
    config: RecoverConfig
    output: Path
    inputs: tuple[tuple[str, str], ...]
    # Not in the fingerprint: both engines give the same bytes.
    engine: Engine = "resident"

    @property
    def name(self) -> str:
        """`teach/part-00003`."""
        return f"teach/part-{self.index:05d}"

    @property
    def fingerprint(self) -> Fingerprint:
        """Model, text, blocks, and how much of the predictions is kept."""
        parts = {"top", "batch_size", "dtype"}
        teacher = self.config.teacher.model_dump(mode="json", include=parts)
        return dict(self.inputs) | {
            "code": f"recover-{VERSION}",
            "config": teacher | {"temperature": self.config.temperature},
            "blocks": [self.start, self.stop],
        }


def teach_units(
    config: RecoverConfig,
    *,
    blocks: int,
    model: Path,
    corpus: Path,
    folder: Path,
    inputs: Mapping[str, str],
    engine: Engine,
) -> list[TeachUnit]:
    """Cuts the text into parts of whole batches; none where no teacher is asked."""
    if not config.alpha:
        return []
    batches = -(-blocks // config.teacher.batch_size)
    parts = min(config.teacher.shards, batches)
    edges = [i * batches // parts * config.teacher.batch_size for i in range(parts)] + [blocks]
    return [
        TeachUnit(
            index=index,
            start=start,
            stop=stop,
            model=model,
            corpus=corpus,
            config=config,
            output=folder / f"part-{index:05d}.arrow",
            inputs=tuple(sorted(inputs.items())),
            engine=engine,
        )
        for index, (start, stop) in enumerate(pairwise(edges))
    ]


class Asker:
    """Holds the original, whole or streamed, from part to part."""

    def __init__(self) -> None:
        self._loaded: tuple[tuple[Path, str, Engine], Any] | None = None

    def run_one(self, unit: TeachUnit) -> dict[str, Any]:
        """Writes one part."""
        key = (unit.model, unit.config.teacher.dtype, unit.engine)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._loaded = (key, open_original(*key))
        found = read_blocks(unit.corpus, unit.start, unit.stop)
        say(self._loaded[1], found, unit.output, unit.config, unit.engine)
        tokens = sum(len(block.tokens) for block in found)
        return {"tokens": tokens, "bytes": unit.output.stat().st_size}


def make_asker() -> Callable[[TeachUnit], Done]:
    """A worker for `cluster.executor.Job`."""
    asker = Asker()
    return lambda unit: execute(unit, asker.run_one)


@dataclass(frozen=True)
class TrainUnit:
    """Trains a reduced checkpoint and writes its weight files anew."""

    student: Path
    needs_code: bool
    corpus: Path
    # In the fingerprint by what they are made from, since they do not stay.
    taught: tuple[TeachUnit, ...]
    config: RecoverConfig
    files: tuple[tuple[str, Path], ...]  # weight file of the student -> the new one
    folder: Path  # states, course
    inputs: tuple[tuple[str, str], ...]
    # Rows of S go by sensitivity; None: all that the student has stay.
    prune: PruneConfig | None = None

    @property
    def name(self) -> str:
        """`recover/train`."""
        return "recover/train"

    @property
    def outputs(self) -> Sequence[Path]:
        """One file for each of the student's."""
        return tuple(path for _, path in self.files)

    @property
    def marker(self) -> Path:
        """Beside the states."""
        return beside(self.folder / "trained")

    @property
    def fingerprint(self) -> Fingerprint:
        """Student, text, teacher and arithmetic; not how many ranks share it."""
        found = dict(self.inputs) | {
            "code": f"recover-{VERSION}",
            "config": self.config.arithmetic,
            "teacher": text_digest([unit.fingerprint for unit in self.taught]),
        }
        if self.prune is None:
            return found
        return found | {"prune": self.prune.model_dump(mode="json")}

    @property
    def training(self) -> Training:
        """For the loop."""
        return Training(
            student=self.student,
            needs_code=self.needs_code,
            corpus=self.corpus,
            taught=tuple(unit.output for unit in self.taught),
            config=self.config,
            folder=self.folder,
            fingerprint=text_digest(self.fingerprint),
            prune=self.prune,
        )


def run_train(unit: TrainUnit, ranks: Ranks) -> dict[str, Any]:
    """Trains to the end and, on rank 0, writes the files.

    Raises:
        Paused: it was asked to; a state is there to go on from.
        TrainingError: a loss or gradient is no number. DiskFull: no room for a state.
    """
    done = train(unit.training, ranks)
    if not done.finished:
        raise Paused(f"paused after step {done.step} of {unit.config.steps}", "run it again")
    rows = _write(done, unit, ranks)
    course = read_course(unit.training.course)
    means = ("loss", "cross_entropy", "distillation")
    return {
        "steps": done.step,
        "tokens": sum(line["tokens"] for line in course),
        "untrained": {str(layer): experts for layer, experts in done.untrained.items()},
        "first": {name: course[0][name] for name in means} if course else {},
        "last": {name: course[-1][name] for name in means} if course else {},
        "trained_values": sum(done.sizes.values()),
        **rows,
    }


def _write(done: Trained, unit: TrainUnit, ranks: Ranks) -> dict[str, Any]:
    """Every rank helps to gather what rank 0 writes, a layer at a time; returns facts about it."""
    if done.kept:
        return _write_pruned(done, unit, ranks)
    if ranks.rank != 0:
        for _ in done.layers():
            pass
        return {}
    student = Checkpoint.open(unit.student, allow_links=True)
    with overwriting(student, dict(unit.files)) as put:
        for values in done.layers():
            put(on_disk(done.model, values, student))
    return {}


def _write_pruned(done: Trained, unit: TrainUnit, ranks: Ranks) -> dict[str, Any]:
    """S gets other sizes, so that no file stays as long as it was."""
    values = done.values
    if ranks.rank != 0:
        return {}
    student = Checkpoint.open(unit.student, allow_links=True)
    cut = cut_student(student, values, done.kept)
    assert cut is not None
    trained = on_disk(done.model, values, student) | cut.tensors
    write_files(student, trained, dict(unit.files), cut.gone)
    return {"rows": cut.numbers}


def make_trainer() -> Callable[[TrainUnit], Done]:
    """A worker that trains alone."""
    return lambda unit: execute(unit, partial(run_train, ranks=Ranks()))


def make_rank(group: ExpertGroup) -> Callable[[Sequence[TrainUnit]], Done | None]:
    """One rank's worker for `cluster.executor.Replicas`; a bundle holds the one unit."""

    def run(bundle: Sequence[TrainUnit]) -> Done | None:
        (unit,) = bundle
        ranks = Ranks(group)
        done = finished(unit) if group.rank == 0 else None
        if not group.largest(int(group.rank == 0 and done is None)):
            return done
        if group.rank == 0:
            return execute(unit, partial(run_train, ranks=ranks))
        run_train(unit, ranks)
        return None

    return run
