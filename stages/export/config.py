"""Config of the export stage."""

from __future__ import annotations

from typing import Literal

from stages.compress.config import CompressConfig
from stages.settings import Settings

VERSION = 1


class ExportConfig(Settings):
    """Which kind of checkpoint is written, and how strictly it is tried out."""

    # native: K experts and K router rows in every layer; opens anywhere, unmodified.
    # mapped: the router keeps its E rows (the paper's semantics); K may differ per layer.
    # expanded: every slot filled with its group's expert; saves nothing, opens anywhere.
    format: Literal["native", "mapped", "expanded"] = "native"
    # native only: a group's router row is its representative's, or the mean of its members'.
    router: Literal["representative", "mean"] = "representative"
    # mapped only: up to this size, logits are compared with those of the expanded model.
    compare_limit_bytes: int = 8 << 30
    # How experts are decomposed: the section `compress` of a run, put here for what writes files.
    compress: CompressConfig | None = None
