"""The rows of the paper's tables: what is done to the experts, and what follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Similarity = Literal["router logits", "router weight", "expert weight", "expert output", "random"]
Recovery = Literal["none", "likelihood", "distillation"]


@dataclass(frozen=True)
class Cell:
    """One reduced model. The defaults are M-SMoE's: adaptive budget, alignment, frequencies."""

    method: Literal["full", "prune", "average", "merge"] = "merge"
    adaptive: bool = True
    aligned: bool = True
    weights: Literal["frequency", "uniform"] = "frequency"
    similarity: Similarity = "router logits"
    decomposed: bool = False
    threshold: Literal["layer", "global"] = "layer"
    recovery: Recovery = "none"

    @property
    def slug(self) -> str:
        """A file name; every property that decides the numbers is in it."""
        return "-".join(f"{value}".replace(" ", "_").lower() for value in asdict(self).values())

    def group(self, seed: int, keep: float) -> dict[str, Any]:
        """The section of a run's config that decides the groups."""
        budget = {"budget": {"keep_ratio": keep}}
        if self.method == "prune":
            return {"method": "frequency"} | budget
        if self.method == "average":
            return {"method": "random", "others": "merge", "seed": seed} | budget
        return {"method": "mc_smoe", "scope": "global" if self.adaptive else "uniform"} | budget


FULL = Cell("full")
PRUNE = Cell("prune", adaptive=False)
AVERAGE = Cell("average", adaptive=False, aligned=False, weights="uniform", similarity="random")
MERGE = Cell()
DECOMPOSED = Cell(decomposed=True)

# Name in the table -> cell. All rows keep as many experts.
ROWS: dict[str, Cell] = {
    "full": FULL,
    "prune": PRUNE,
    "average": AVERAGE,
    "M-SMoE": MERGE,
    "MC-SMoE": DECOMPOSED,
}
RECOVERED = {name: replace(c, recovery="distillation") for name, c in ROWS.items() if c != FULL}
# What differs from M-SMoE in one property; nothing is trained.
ABLATIONS: dict[str, Cell] = {
    "M-SMoE": MERGE,
    "no alignment": replace(MERGE, aligned=False),
    "uniform budget": replace(MERGE, adaptive=False),
    "uniform averaging": replace(MERGE, weights="uniform"),
    "grouped by router weight": replace(MERGE, similarity="router weight"),
    "grouped by expert weight": replace(MERGE, similarity="expert weight"),
    "grouped by expert output": replace(MERGE, similarity="expert output"),
    "grouped at random": replace(MERGE, similarity="random"),
}
# How the rows of S are divided over layers and matrices; nothing is trained.
THRESHOLD: dict[str, Cell] = {
    "the same share everywhere": DECOMPOSED,
    "one threshold for all": replace(DECOMPOSED, threshold="global"),
}
# M-SMoE trained with and without the original's predictions.
DISTILLATION: dict[str, Cell] = {
    "nothing": MERGE,
    "likelihood alone": replace(MERGE, recovery="likelihood"),
    "likelihood and distillation": replace(MERGE, recovery="distillation"),
}


def cells() -> list[Cell]:
    """All of them once, those that are not trained first."""
    tables = (ROWS, ABLATIONS, THRESHOLD, RECOVERED, DISTILLATION)
    found = dict.fromkeys(cell for table in tables for cell in table.values())
    return sorted(found, key=lambda cell: cell.recovery != "none")
