"""The methods that are compared, with their default settings, and what counts as published."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


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

    @property
    def only_refitted(self) -> bool:
        """Whether there is nothing to measure without a refit."""
        return self.control or "refit" in self.sections


def _thorough(*, divided: bool, tokens: int | None = None, steps: int | None = None) -> Recipe:
    """Ours behind `refit.preset: thorough`; where the budget is divided, sizes are tried without
    a refit.

    Args:
        steps: of polishing, instead of the preset's.
    """
    group = {"method": "coalesce"} | ({"divide": "probe"} if divided else {})
    sections: dict[str, dict[str, Any]] = {"refit": {"preset": "thorough"}}
    if steps is not None:
        sections["refit"]["polish"] = {"steps": steps}
    if divided:
        sections["probe"] = {"refit": False}
    return Recipe(
        group,
        "mapped" if divided else "native",
        published=False,
        sections=sections,
        all_tokens=True,
        tokens=tokens,
    )


METHODS: dict[str, Recipe] = {
    "coalesce": Recipe({"method": "coalesce"}, published=False),
    "coalesce thorough": _thorough(divided=False),
    "coalesce thorough divided": _thorough(divided=True),
    "coalesce thorough divided, more text": _thorough(divided=True, tokens=262_144),
    "coalesce thorough divided, most text": _thorough(divided=True, tokens=524_288),
    "coalesce thorough divided, most text, more steps": _thorough(
        divided=True, tokens=524_288, steps=1500
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
    "mixed": Recipe({"method": "mixed"}, published=False),
    "mc_smoe neurons": Recipe(
        {"method": "mc_smoe"}, "mapped", published=False, sections={"merge": {"by": "neurons"}}
    ),
    "random": Recipe({"method": "random"}, published=False, seeded=("seed",)),
    "control: fewer random experts": Recipe(
        {"method": "random"}, published=False, control=True, seeded=("seed",)
    ),
    "control: random neurons": Recipe({"method": "coalesce"}, published=False, control=True),
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
