"""Config of the evaluate stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.corpus.config import CorpusConfig
from stages.settings import Settings

VERSION = 1


class EvaluateConfig(Settings):
    """Which held-out text, and against which plain pruning at the same number of bytes."""

    data: CorpusConfig
    baselines: tuple[Literal["frequency", "reap"], ...] = ("frequency", "reap")
    # The baselines' checkpoints are removed once they were measured.
    keep_baselines: bool = False
    batch_size: int = Field(default=8, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # Positions per domain at which whole distributions are compared (KL to the original). Each
    # takes vocabulary x 4 bytes on disk while the run lasts.
    kl_positions: int = Field(default=512, ge=0)
