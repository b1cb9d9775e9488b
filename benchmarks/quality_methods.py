"""The methods that are compared, with their default settings, and what counts as published."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stages.calibrate.config import OBSERVED


@dataclass(frozen=True)
class Recipe:
    """A group section (without its budget), the format it is written in, and its standing."""

    group: dict[str, Any]
    format: str = "native"
    # Somebody else's method: chance, controls and our own default are not.
    published: bool = True
    # Random gate and up projections in place of the experts' own, always refitted.
    control: bool = False
    # Words of the group section that take the seed of the calibration.
    seeded: tuple[str, ...] = field(default=())
    # What other sections of a run's config say.
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Refitted on all observed tokens, not on the sample of the others.
    all_tokens: bool = False
    # Observed tokens; None: as many as for the others.
    tokens: int | None = None
    # With `all_tokens`: whether all experts run on all of them.
    statistics: bool = False

    @property
    def only_refitted(self) -> bool:
        """Whether there is nothing to measure without a refit."""
        return self.control or ("refit" in self.sections and self.all_tokens)


# Those that come nearest to the default; they are also given its text.
RIVALS: dict[str, dict[str, Any]] = {
    "naee": {"method": "naee"},
    "reap": {"method": "reap"},
    "ean": {"method": "ean"},
    "ream": {"method": "ream"},
    "mc_smoe global": {"method": "mc_smoe", "scope": "global"},
}


def _with_text(method: str) -> Recipe:
    """Somebody else's method on all the text of the default, which it also samples."""
    form = "mapped" if method in ("ream", "mc_smoe global") else "native"
    return Recipe(RIVALS[method], form, all_tokens=True, tokens=OBSERVED, statistics=True)


METHODS: dict[str, Recipe] = {
    # What a small model gets: refitted layer after layer on all that is observed by default.
    "coalesce": Recipe({"method": "coalesce"}, published=False, all_tokens=True, tokens=OBSERVED),
    # The same with widths that are divided between the layers.
    "coalesce divided": Recipe(
        {"method": "coalesce", "divide": "probe"},
        "mapped",
        published=False,
        sections={"refit": {}, "probe": {"refit": False}},
        all_tokens=True,
        tokens=OBSERVED,
    ),
    # What a large model gets: every layer for itself, on a sample of the text of the others.
    "coalesce parallel": Recipe(
        {"method": "coalesce"}, published=False, sections={"refit": {"preset": "parallel"}}
    ),
    # Layer after layer on the text of the others, all of it, with fewer steps.
    "coalesce less text": Recipe(
        {"method": "coalesce"},
        published=False,
        sections={"refit": {"preset": "thorough", "polish": {"steps": 600}}},
        all_tokens=True,
    ),
    "reap": Recipe({"method": "reap"}),
    "frequency": Recipe({"method": "frequency"}),
    "ean": Recipe({"method": "ean"}),
    "msan": Recipe({"method": "msan"}),
    "stun": Recipe({"method": "stun"}),
    "naee": Recipe({"method": "naee"}),
    "mc_smoe uniform": Recipe({"method": "mc_smoe"}, "mapped"),
    "mc_smoe global": Recipe({"method": "mc_smoe", "scope": "global"}, "mapped"),
    "uncurl": Recipe({"method": "uncurl"}, "mapped", seeded=("seed",)),
    "hc_smoe": Recipe({"method": "hc_smoe"}, "mapped"),
    "ream": Recipe({"method": "ream"}, "mapped"),
    "merge_moe": Recipe({"method": "merge_moe"}, "mapped"),
    **{f"{method} more text": _with_text(method) for method in RIVALS},
    "mixed": Recipe({"method": "mixed"}, published=False),
    "mc_smoe neurons": Recipe(
        {"method": "mc_smoe"}, "mapped", published=False, sections={"merge": {"by": "neurons"}}
    ),
    "random": Recipe({"method": "random"}, published=False, seeded=("seed",)),
    "control: fewer random experts": Recipe(
        {"method": "random"}, published=False, control=True, seeded=("seed",)
    ),
    "control: random neurons": Recipe({"method": "coalesce"}, published=False, control=True),
    # Learned anew as the default is refitted.
    "control: random neurons, more text": Recipe(
        {"method": "coalesce"}, published=False, control=True, all_tokens=True, tokens=OBSERVED
    ),
}
QUICK = ("coalesce", "reap", "mc_smoe uniform")


@dataclass(frozen=True)
class Cell:
    """One reduced model: a method at `keep` of the expert bytes, with or without our refit."""

    method: str
    keep: float
    refit: bool

    @property
    def slug(self) -> str:
        """A file name."""
        words = f"{self.method} {self.keep} {'refit' if self.refit else 'plain'}"
        return "-".join(words.replace(":", "").replace(",", "").split())

    @property
    def refit_section(self) -> dict[str, Any]:
        """The refit section of a run's config: defaults, but for whether there is one, and what
        the recipe says."""
        return METHODS[self.method].sections.get("refit", {}) | {"enabled": self.refit}

    def group(self, seed: int) -> dict[str, Any]:
        """The group section of a run's config."""
        recipe = METHODS[self.method]
        seeds = dict.fromkeys(recipe.seeded, seed)
        return recipe.group | seeds | {"budget": {"keep_ratio": self.keep}}


def cells(methods: Iterable[str], ratios: Iterable[float]) -> list[Cell]:
    """Every method at every ratio, without refit and with it; some only with it."""
    return [
        Cell(method, keep, refit)
        for keep in ratios
        for method in methods
        for refit in (False, True)
        if refit or not METHODS[method].only_refitted
    ]
