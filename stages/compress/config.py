"""Config of the compress stage: experts as U V + S."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stages.settings import Settings

VERSION = 2

# MC-SMoE, arXiv 2310.01334, section 4: rank 32, a tenth of the rows of S.
_PAPER = {"rank": 32, "sparse": 0.1, "multiple": 1}


class CompressConfig(Settings):
    """How every matrix of the experts that are left is decomposed. Give `rank` or `ratio`."""

    # paper: rank 32 and a tenth of the rows of S, unless they are given.
    preset: Literal["paper"] | None = None
    # The rank itself,
    rank: int | None = Field(default=None, gt=0)
    # or the share of a matrix's values that both factors together may hold.
    ratio: float | None = Field(default=None, gt=0, le=1)
    # Share of the rows (or columns) of S that is kept; 0: low rank alone.
    sparse: float = Field(default=0.1, ge=0, le=1)
    axis: Literal["rows", "columns"] = "rows"
    # Ranks that a ratio gives and numbers of kept rows, from this on, are multiples of it: grouped
    # matrix products want rows of whole 16 bytes.
    multiple: int = Field(default=8, gt=0)
    # weights: norms of S, no data. activations: what dropping them costs on the sampled tokens.
    # sensitivity: |w dL/dw|, accumulated while the section `recover` trains the model.
    importance: Literal["weights", "activations", "sensitivity"] = "weights"
    # With importance=sensitivity: what decides the S of the checkpoint before training.
    one_shot: Literal["weights", "activations"] = "weights"
    # layer: the same share of S in every matrix. global: the share of all S together, its rows
    # ranked by how much of their own matrix they hold; needs a pass over all layers before.
    threshold: Literal["layer", "global"] = "layer"
    # Layer -> matrix -> rows (or columns) of S, as the global threshold decided; not for users.
    numbers: dict[int, dict[str, int]] | None = None
    # Low rank where the sampled inputs are, not where the weights are large.
    whiten: bool = False
    # Added to the second moments of the inputs, in units of their mean diagonal.
    ridge: float = Field(default=0.01, gt=0)
    svd: Literal["auto", "exact", "randomised"] = "auto"
    # MoE layers whose experts stay whole.
    skip_layers: tuple[int, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") != "paper":
            return values
        chosen = values.get("rank") is not None or values.get("ratio") is not None
        return {name: n for name, n in _PAPER.items() if not (name == "rank" and chosen)} | values

    @model_validator(mode="after")
    def _one_rank(self) -> Self:
        if (self.rank is None) == (self.ratio is None):
            raise ValueError("give either rank (32 in the paper) or ratio (0.25, say)")
        if self.threshold == "global" and not 0 < self.sparse < 1:
            raise ValueError(
                f"threshold=global divides a part of S over the layers; sparse={self.sparse:g}"
                " keeps the same of every one: use threshold=layer"
            )
        if self.one_shot != "weights" and self.importance != "sensitivity":
            raise ValueError(
                f"one_shot={self.one_shot} belongs to importance=sensitivity; without training set"
                f" importance={self.one_shot}"
            )
        return self

    @property
    def at_once(self) -> Self:
        """What is kept before any training."""
        if self.importance != "sensitivity":
            return self
        return self.model_copy(update={"importance": self.one_shot})

    @property
    def all_rows(self) -> Self:
        """The same factors with all of S."""
        return self.model_copy(update={"sparse": 1.0, "threshold": "layer", "numbers": None})

    def kept(self, layer: int, matrix: str) -> int | None:
        """How much of S this matrix keeps; None: its share."""
        return None if self.numbers is None else self.numbers[layer][matrix]

    @property
    def needs_inputs(self) -> bool:
        """Whether the sample of what enters the layers is read."""
        return self.whiten or self.at_once.importance == "activations"
