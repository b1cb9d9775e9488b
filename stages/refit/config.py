"""Config of the refit: how the down projections are solved again after a reduction."""

from __future__ import annotations

from pydantic import Field

from stages.settings import Settings

VERSION = 1


class RefitConfig(Settings):
    """Needs the layer-input sample (`calibrate.sample`). Off: reduced experts stay as they are."""

    enabled: bool = True
    # Candidates for the ridge, in units of each expert's mean feature energy. The best on held-out
    # tokens is taken; if none of them beats leaving the weights alone, they are left alone.
    strengths: tuple[float, ...] = Field(default=(0.001, 0.01, 0.1, 1.0), min_length=1)
    # Share of the sample that chooses, in whole blocks of text.
    held_out: float = Field(default=0.2, gt=0, lt=1)
    # Largest number of unknown rows (experts x neurons) that is solved at once; beyond it experts
    # are solved one after another until nothing moves. The Gram matrix takes 8 times its square.
    joint_limit: int = Field(default=8192, ge=0)
