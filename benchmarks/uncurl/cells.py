"""One number each: which model, reduced how and for what, tuned how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks.uncurl.recipes import EVERYTHING, GROUPINGS, ROUTERS, SCRATCH, TUNED
from benchmarks.uncurl.setup import Setup

PLAIN, TWO_STAGE, ROUTER_ONLY = "plain", "two stages", "router only"


@dataclass(frozen=True)
class Cell:
    """A reduction of one trained model; kept == experts: the model as it was trained."""

    seed: int
    experts: int
    kept: int
    recipe: str
    task: str  # the domain that statistics and tuning are of, or EVERYTHING
    tuning: str = PLAIN

    @property
    def slug(self) -> str:
        """A file name."""
        words = f"{self.seed} {self.experts} {self.kept} {self.recipe} {self.task} {self.tuning}"
        return "-".join(words.replace(",", "").split())

    @property
    def factor(self) -> int:
        """Experts before over experts after."""
        return self.experts // self.kept


def cells(setup: Setup) -> list[Cell]:
    """All cells of one seed after the other, each once."""
    found = [cell for seed in setup.seeds for cell in _of_seed(setup, seed)]
    return list(dict.fromkeys(found))


def _of_seed(setup: Setup, seed: int) -> Iterator[Cell]:
    yield from _untouched(setup, seed)
    yield from _curve(setup, seed)
    yield from _one_task_or_another(setup, seed)
    yield from _routers(setup, seed)
    yield from _tuned(setup, seed)


def _untouched(setup: Setup, seed: int) -> Iterator[Cell]:
    for size in setup.sizes:
        yield Cell(seed, size, size, SCRATCH, EVERYTHING)


def _curve(setup: Setup, seed: int) -> Iterator[Cell]:
    """Every grouping at every size for the first task, without training."""
    for experts, numbers in setup.kept.items():
        for kept, recipe in product(numbers, GROUPINGS):
            yield Cell(seed, experts, kept, recipe, setup.tasks[0])


def _one_task_or_another(setup: Setup, seed: int) -> Iterator[Cell]:
    """Statistics of one task, of another, or of all text."""
    for recipe, task in product(GROUPINGS, (*setup.tasks, EVERYTHING)):
        yield Cell(seed, *setup.focus, recipe, task)


def _routers(setup: Setup, seed: int) -> Iterator[Cell]:
    for recipe in ROUTERS:
        yield Cell(seed, *setup.focus, recipe, setup.tasks[0], ROUTER_ONLY)


def _tuned(setup: Setup, seed: int) -> Iterator[Cell]:
    """Reduced to a number of experts that was also trained from scratch, and those."""
    task = setup.tasks[0]
    for size in setup.sizes:
        yield Cell(seed, size, size, SCRATCH, task, TWO_STAGE)
    for recipe in TUNED:
        for experts, numbers in setup.kept.items():
            for kept in (each for each in numbers if each in setup.sizes):
                yield Cell(seed, experts, kept, recipe, task, TWO_STAGE)
