"""Config of the export stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.compress.config import CompressConfig
from stages.settings import Settings

VERSION = 1


class ExportConfig(Settings):
    """Which kind of checkpoint is written, and how strictly it is tried out."""

    # native: K experts and K router rows in every layer; opens anywhere, unmodified.
    # mapped: the router keeps its E rows (the paper's semantics); K may differ per layer.
    # expanded: every slot filled with its group's expert; saves nothing, opens anywhere.
    format: Literal["native", "mapped", "expanded"] = "native"
    # native only; mapped and expanded keep all rows. A group's router row is its representative's,
    # the mean of its members', fitted to the log-sum-exp of their logits (needs calibrate.sample),
    # or drawn anew (UNCURL; useless without training).
    router: Literal["representative", "mean", "least_squares", "reinit"] = "representative"
    # Of reinit.
    router_seed: int = Field(default=0, ge=0)
    # mapped only: up to this size, logits are compared with those of the expanded model.
    compare_limit_bytes: int = 8 << 30
    # How experts are decomposed: the section `compress` of a run, put here for what writes files.
    compress: CompressConfig | None = None

    @property
    def all_rows(self) -> Self:
        """The same files with all rows of S."""
        if self.compress is None:
            return self
        return self.model_copy(update={"compress": self.compress.all_rows})

    @model_validator(mode="after")
    def _rows_are_cut(self) -> Self:
        if self.format != "native" and self.router != "representative":
            raise ValueError(
                f"router={self.router} needs format=native: {self.format} keeps the router as it is"
            )
        return self
