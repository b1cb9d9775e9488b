"""Config of the probe stage."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stages.settings import Settings

VERSION = 1


class ProbeConfig(Settings):
    """One layer at a time is narrowed, everything else stays; units are layers."""

    # Shares of the neurons that are tried. None below the smallest is given to any layer.
    ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.125, 0.25, 0.375, 0.5, 0.75), min_length=1
    )
    # Of the calibration text, in whole blocks that shaped no layer (`refit.held_out`).
    tokens: int = Field(default=8192, gt=0)
    # At how many of their positions distributions are compared.
    positions: int = Field(default=2048, gt=0)
    # Whether a tried size is refitted as the run's layers are. false: narrowed alone, with its rows
    # solved again on the whole sample; a fraction of the work.
    refit: bool = True
