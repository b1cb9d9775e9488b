"""Config of the align stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.settings import Settings

VERSION = 3

Criterion = Literal["weights", "activations", "both"]


class AlignConfig(Settings):
    """Whether members of a group are aligned to its reference before they are averaged."""

    enabled: bool = True
    # What makes two neurons alike: their weights, what they do on sampled tokens, or both.
    by: Criterion = "weights"
    # Not with `weights`: tokens of the sample that neurons are compared on, evenly spread.
    tokens: int = Field(default=4096, gt=0)
    # Which member the others are aligned to, and whose router row the native format keeps.
    reference: Literal["method", "most_frequent", "highest_saliency"] = "method"

    @property
    def watches(self) -> bool:
        """Whether neurons are matched by what they do."""
        return self.enabled and self.by != "weights"
