"""The training loop: the same in one process and on several ranks, from the start or from a state.

Dropout and router noise are off, as in the paper's code: the student is in eval mode. Everything
that a step does follows from its number: which blocks, which rate. A training that was killed goes
on from its newest state as if nothing had been, and on another number of ranks as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from stages.corpus.blocks import Block
from stages.forward import predicted
from stages.recover.config import PruneConfig, RecoverConfig
from stages.recover.faults import refuse_non_finite
from stages.recover.layers import by_layer
from stages.recover.opened import exact_values, open_student, rounded
from stages.recover.order import blocks_of_step, share_of
from stages.recover.passes import part_of_loss, teacher_of_blocks
from stages.recover.plain import Optimiser, Plain, shape_of
from stages.recover.progress import Course
from stages.recover.pruning import Pruning
from stages.recover.ranks import Ranks
from stages.recover.rate import rate_at
from stages.recover.recompute import recompute
from stages.recover.state import KINDS, Kind, Named, State, newest, save
from stages.recover.taught import Taught
from stages.recover.text import Text
from stages.recover.values import moved, trained_parameters, untrained_experts

ALONE = Ranks()


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and where it leaves its states."""

    student: Path  # a checkpoint folder of any format
    needs_code: bool  # whether it opens with the modeling file beside it
    corpus: Path
    taught: tuple[
        Path, ...
    ]  # parts of the teacher's predictions along the corpus; none: no teacher
    config: RecoverConfig
    folder: Path  # states and the course
    # A state of another one is not gone on from.
    fingerprint: str = ""
    # Rows of S go by sensitivity. None: all stay.
    prune: PruneConfig | None = None

    @property
    def course(self) -> Path:
        """One line per step."""
        return self.folder / "course.jsonl"

    @property
    def stop(self) -> Path:
        """Once this file is there, a state is written and training pauses."""
        return self.folder / "stop"


@dataclass(frozen=True)
class Trained:
    """How it ended."""

    step: int
    finished: bool  # whether it came to its end; otherwise it was asked to pause
    model: Any  # the student, to know how its tensors are called on disk
    optimiser: Optimiser  # has what was trained
    sizes: dict[str, int]  # of it, by name in memory
    untrained: dict[int, list[int]] = field(default_factory=dict)  # layer -> see `values.py`
    kept: Named = field(default_factory=dict)  # name of S -> rows that stay [K, n], where pruned

    @cached_property
    def values(self) -> Named:
        """What was trained, in fp32, by name in memory; all ranks ask for it together."""
        return {name: value.clone() for name, value in self.optimiser.gathered("values")}

    def layers(self) -> Iterator[Named]:
        """The same, a layer at a time; all ranks walk along together."""
        return by_layer(self.optimiser.gathered("values"))


def train(training: Training, ranks: Ranks = ALONE) -> Trained:
    """Trains to the end, or until it is asked to pause; all ranks of a group call it together.

    Raises:
        TrainingError: a loss or gradient is no number.
        DiskFull: a state could not be written; the one before stays.
    """
    loop = Loop(training, ranks)
    while loop.step < training.config.steps:
        asked = loop.advance()
        at_end = loop.step == training.config.steps
        if asked and not at_end:
            loop.save()
            return loop.ended()
        if at_end or loop.step % training.config.checkpoint_every == 0:
            loop.save()
    return loop.ended()


class Loop:
    """A student between two steps."""

    def __init__(self, training: Training, ranks: Ranks) -> None:
        config = training.config
        self._training, self._config, self._ranks = training, config, ranks
        self._text = Text(training.corpus)
        self._taught = Taught(training.taught) if training.taught else None
        self.model = open_student(training.student, config, ranks, needs_code=training.needs_code)
        recompute(self.model, config, ranks)
        self._trained = trained_parameters(self.model, config)
        self._pruning = make_pruning(training, self._trained)
        self.optimiser: Optimiser = make_optimiser(self.model, self._trained, training, ranks)
        self.kept: Named = {}
        self.step = 0
        if (state := self._newest()) is not None:
            self.optimiser.load(state)
            self.step = state.step
            self._prune_from(state)
        self._course = Course(training.course, self.step) if ranks.rank == 0 else None

    def advance(self) -> bool:
        """One update; whether somebody asked to pause."""
        config, begun = self._config, time.monotonic()
        indices = blocks_of_step(self.step, len(self._text), config.batch, config.seed)
        tokens = predicted(self.model.config, [b.tokens for b in self._text.blocks(indices)])
        own = share_of(indices, self._ranks.rank, self._ranks.size, config.micro_batch)
        sums = torch.zeros(2, dtype=torch.float64)
        for number, part in enumerate(own):
            loss, found = part_of_loss(*self._pass(part), config, tokens)
            sums += found.cpu()
            self.optimiser.backward(loss, last=number == len(own) - 1)
        total = self._agree(sums)
        means = [float(total[0]) / tokens, float(total[1]) / tokens]
        again = partial(self._forward_again, own)
        self._expect_finite("loss", sum(means), again)
        rate = rate_at(self.step, config)
        if self._pruning is not None:
            self._pruning.observe()
        norm = self.optimiser.step(rate)
        self._expect_finite("gradient", norm, again)
        self.step += 1
        if self._pruning is not None:
            self.kept = self._pruning.apply(self.step)
        self._tell(means, norm, rate, tokens, time.monotonic() - begun)
        return bool(total[2])

    def save(self) -> None:
        """Writes a state; every rank takes part in gathering it."""
        parts = self._parts()
        if self._ranks.rank != 0:
            for _ in parts:
                pass
            return
        shapes = {name: shape_of(parameter) for name, parameter in self._trained.items()}
        scores = {} if self._pruning is None else self._pruning.scores
        state = State.at(self._training.folder, self.step)
        save(state, shapes, parts, scores, self._training.fingerprint)

    def ended(self) -> Trained:
        """What has become of it; every rank calls it."""
        sizes = {name: shape_of(each).numel() for name, each in self._trained.items()}
        finished = self.step == self._config.steps
        silent = {}
        if finished:
            moments = self.optimiser.gathered("second")
            silent = untrained_experts(self.model, {name: moved(each) for name, each in moments})
        return Trained(self.step, finished, self.model, self.optimiser, sizes, silent, self.kept)

    def _parts(self) -> Iterator[tuple[Kind, str, Tensor]]:
        for kind in KINDS:
            for name, tensor in self.optimiser.gathered(kind):
                yield kind, name, tensor

    def _newest(self) -> State | None:
        """The newest state that is whole: rank 0 looks, all go on from the same."""
        folder, fingerprint = self._training.folder, self._training.fingerprint
        found = newest(folder, fingerprint) if self._ranks.rank == 0 else None
        step = int(self._ranks.total(torch.tensor(0 if found is None else found.step)))
        return State.at(folder, step) if step else None

    def _prune_from(self, state: State) -> None:
        if self._pruning is not None:
            self._pruning.load(state.more)
            self.kept = self._pruning.apply(state.step)

    def _pass(self, indices: list[int]) -> tuple[Any, list[Block], Any]:
        blocks = self._text.blocks(indices)
        return self.optimiser.model, blocks, teacher_of_blocks(self._taught, indices)

    def _agree(self, sums: Tensor) -> Tensor:
        """[3] sums of the whole step, and on how many ranks a pause is wanted."""
        asked = torch.tensor([float(self._ranks.rank == 0 and self._training.stop.exists())])
        return self._ranks.total(torch.cat([sums, asked.double()]))

    def _expect_finite(self, what: str, value: float, forward: Callable[[], Any]) -> None:
        if not abs(value) < float("inf"):
            refuse_non_finite(self.step, what, self._trained, self.model, forward)

    def _forward_again(self, own: list[list[int]]) -> None:
        for part in own:
            part_of_loss(*self._pass(part), self._config, 1)

    def _tell(
        self, means: list[float], norm: float, rate: float, tokens: int, seconds: float
    ) -> None:
        if self._course is not None:
            self._course.add(
                {
                    "step": self.step,
                    "loss": round(means[0] + self._config.alpha * means[1], 6),
                    "cross_entropy": round(means[0], 6),
                    "distillation": round(means[1], 6),
                    "gradient_norm": round(norm, 6),
                    "rate": rate,
                    "tokens": tokens,
                    "seconds": round(seconds, 3),
                }
            )


def make_pruning(training: Training, trained: Any) -> Pruning | None:
    """What drops rows of S, where it was asked for; before the values are dealt out."""
    if training.prune is None:
        return None
    student = Checkpoint.open(training.student, allow_links=True)
    stored = {info.meta().element_size() for n, info in student.tensors.items() if n.endswith(".s")}
    return Pruning(trained, training.prune, training.config.steps, max(stored, default=4))


def make_optimiser(model: Any, trained: Any, training: Training, ranks: Ranks) -> Optimiser:
    """Plain torch in one process, DeepSpeed where it was asked for or there are more."""
    config = training.config
    if ranks.group is None:
        return Plain(model, trained, config)
    from stages.recover.zero import Zero

    optimiser = Zero(model, trained, config, ranks)
    if config.deepspeed is not None and config.deepspeed.bf16 and rounded(training.student):
        names, needs_code = trained.keys(), training.needs_code
        optimiser.begin_with(exact_values(training.student, names, needs_code=needs_code))
    return optimiser
