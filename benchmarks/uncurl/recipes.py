"""The reductions that are compared: sections of a run's config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Every kind of statistics but one domain's.
EVERYTHING = "all"


@dataclass(frozen=True)
class Recipe:
    """`group` without budget and task; other sections that differ from the defaults."""

    group: dict[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)
    seeded: bool = False  # `group.seed` is the seed of the model


MAPPED = {"export": {"format": "mapped"}}
# Rows that do not say otherwise have zeros on the diagonal of the affinity, as in the clustering
# that the paper cites; the product's default keeps the ones.
ZEROS = {"method": "uncurl", "zero_diagonal": True}


def _router(router: str) -> Recipe:
    return Recipe(ZEROS, {"export": {"router": router}}, seeded=True)


# Without training: the original router stays, or loses rows.
GROUPINGS = {
    "uncurl": Recipe(ZEROS, MAPPED, seeded=True),
    "uncurl, diagonal kept": Recipe({"method": "uncurl"}, MAPPED, seeded=True),
    "uncurl, not aligned": Recipe(ZEROS, {**MAPPED, "align": {"enabled": False}}, seeded=True),
    "frequency merge": Recipe({"method": "uncurl", "grouping": "frequency_merge"}, MAPPED),
    "frequency prune": Recipe({"method": "uncurl", "grouping": "frequency_prune"}),
    "mc_smoe": Recipe({"method": "mc_smoe", "scope": "global"}, MAPPED),
    "random clusters": Recipe({"method": "random", "others": "merge"}, MAPPED, seeded=True),
}
# The same groups behind other routers.
ROUTERS = {
    "uncurl, remapped": GROUPINGS["uncurl"],
    "uncurl, representative": _router("representative"),
    "uncurl, mean": _router("mean"),
    "uncurl, least squares": _router("least_squares"),
    # The paper's protocol: the preset draws the router anew.
    "uncurl, paper": Recipe({"method": "uncurl", "preset": "paper"}, seeded=True),
}
RECIPES = GROUPINGS | ROUTERS
# Tuned in two stages; "scratch" is a model that was trained with so many experts.
SCRATCH = "scratch"
TUNED = (
    "uncurl, paper",
    "uncurl, remapped",
    "frequency prune",
    "random clusters",
    "frequency merge",
    "mc_smoe",
)
