"""Config of the merge stage."""

from __future__ import annotations

from typing import Literal

from stages.settings import Settings

VERSION = 1


class MergeConfig(Settings):
    """How the members of a group are weighted: by activation frequency (the paper), or equally."""

    weights: Literal["frequency", "uniform"] = "frequency"
