"""Config of the merge stage."""

from __future__ import annotations

from typing import Literal

from stages.settings import Settings

VERSION = 2


class MergeConfig(Settings):
    """How the members of a group are weighted."""

    # method: as the deciding method says (frequency; saliency for ream). frequency: share of the
    # layer's selections. saliency: REAP's mean g|f|. alpha: what costs least on the sampled
    # tokens, exactly for pairs (needs calibrate.sample).
    weights: Literal["method", "frequency", "saliency", "uniform", "alpha"] = "method"
