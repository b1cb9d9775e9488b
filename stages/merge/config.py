"""Config of the merge stage."""

from __future__ import annotations

from typing import Literal

from stages.settings import Settings

VERSION = 3


class MergeConfig(Settings):
    """How the members of a group are weighted."""

    # method: as the deciding method says (frequency; saliency for ream). frequency: share of the
    # layer's selections. saliency: REAP's mean g|f|. alpha: what costs least on the sampled
    # tokens, exactly for pairs (needs calibrate.sample).
    weights: Literal["method", "frequency", "saliency", "uniform", "alpha"] = "method"
    # What is merged. weights: aligned experts are averaged. neurons: those of all members are
    # pooled, and the best of them kept (docs/reduction.md); needs calibrate.sample.
    by: Literal["weights", "neurons"] = "weights"
