"""The training loop: the same in one process and on several ranks, from the start or from a state.

Dropout and router noise are off, as in the paper's code: the student is in eval mode. Everything
that a step does follows from its number: which blocks, which rate. A training that was killed goes
on from its newest state as if nothing had been, and on another number of ranks as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from stages.corpus.blocks import Block
from stages.model import load_model
from stages.recover.config import PruneConfig, RecoverConfig
from stages.recover.faults import refuse_non_finite
from stages.recover.order import blocks_of_step, share_of
from stages.recover.passes import part_of_loss, predicted, teacher_of_blocks
from stages.recover.plain import Optimiser, Plain
from stages.recover.progress import Course
from stages.recover.pruning import Pruning
from stages.recover.ranks import Ranks
from stages.recover.rate import rate_at
from stages.recover.state import Named, State, newest, save
from stages.recover.taught import Taught
from stages.recover.text import Text
from stages.recover.values import trained_parameters, untrained_experts

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
    """How it ended. `values` in fp32, by name in memory: those that were trained."""

    step: int
    values: Named
    untrained: dict[int, list[int]]  # layer -> experts that never got a gradient
    model: Any  # the student, to know how its tensors are called on disk
    kept: Named = field(default_factory=dict)  # name of S -> rows that stay [K, n], where pruned

    @property
    def finished(self) -> bool:
        """Whether it came to its end; otherwise it was asked to pause."""
        return bool(self.values)


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
            return Trained(loop.step, {}, {}, loop.model)
        if at_end or loop.step % training.config.checkpoint_every == 0:
            loop.save()
    _, second = loop.optimiser.moments()
    silent = untrained_experts(loop.model, second)
    return Trained(loop.step, loop.optimiser.values(), silent, loop.model, loop.kept)


class Loop:
    """A student between two steps."""

    def __init__(self, training: Training, ranks: Ranks) -> None:
        config = training.config
        self._training, self._config, self._ranks = training, config, ranks
        self._text = Text(training.corpus)
        self._taught = Taught(training.taught) if training.taught else None
        self.model = load_model(training.student, "float32", trust_remote_code=training.needs_code)
        self._trained = trained_parameters(self.model, config)
        self._pruning = make_pruning(training, self._trained)
        self.optimiser: Optimiser = make_optimiser(self.model, self._trained, config, ranks)
        self.kept: Named = {}
        self.step = 0
        if (state := newest(training.folder, training.fingerprint)) is not None:
            self.optimiser.load(state.values, state.first, state.second, state.step)
            self.step = state.step
            self._prune_from(state)
        self._course = Course(training.course, self.step) if ranks.rank == 0 else None

    def advance(self) -> bool:
        """One update; whether somebody asked to pause."""
        config, begun = self._config, time.monotonic()
        indices = blocks_of_step(self.step, len(self._text), config.batch, config.seed)
        tokens = predicted(self._text.blocks(indices))
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
        values, (first, second) = self.optimiser.values(), self.optimiser.moments()
        if self._ranks.rank == 0:
            scores = {} if self._pruning is None else self._pruning.scores
            state = State(self.step, values, first, second, scores)
            save(self._training.folder, state, self._training.fingerprint)

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


def make_optimiser(model: Any, trained: Any, config: RecoverConfig, ranks: Ranks) -> Optimiser:
    """Plain torch in one process, DeepSpeed where it was asked for or there are more."""
    if ranks.group is None:
        return Plain(model, trained, config)
    from stages.recover.zero import Zero

    return Zero(model, trained, config, ranks)
