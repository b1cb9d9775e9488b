"""The processes that train together, as the loop sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from cluster.expert_parallel import ExpertGroup


@dataclass(frozen=True)
class Ranks:
    """One process alone, or one of a group."""

    group: ExpertGroup | None = None

    @property
    def rank(self) -> int:
        """From 0; rank 0 writes files."""
        return 0 if self.group is None else self.group.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else self.group.size

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, the same on all of them."""
        return values if self.group is None else self.group.total(values)
