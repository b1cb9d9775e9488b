"""Config of the align stage."""

from __future__ import annotations

from typing import Literal

from stages.settings import Settings

VERSION = 2

Criterion = Literal["weights", "activations", "both"]


class AlignConfig(Settings):
    """Whether members of a group are aligned to its reference before they are averaged."""

    enabled: bool = True
    # What makes two neurons alike: their weights, what they do on sampled tokens, or both.
    by: Criterion = "weights"
    # Which member the others are aligned to, and whose router row the native format keeps.
    reference: Literal["method", "most_frequent", "highest_saliency"] = "method"
