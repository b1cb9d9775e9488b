"""Config of the group stage: a method and a budget."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.settings import Settings

VERSION = 1


class Budget(Settings):
    """How much to keep; exactly one of the three."""

    # Mean number of experts per layer.
    experts_per_layer: float | None = Field(default=None, gt=0)
    # Share of the experts.
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    # Size of all weight files of the output.
    target_bytes: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of experts_per_layer, keep_ratio, target_bytes;"
                f" got {', '.join(given) or 'none'}"
            )
        return self


class _Method(Settings):
    budget: Budget = Budget(keep_ratio=0.5)
    # Layers that keep all their experts.
    skip_layers: tuple[int, ...] = ()


class McSmoe(_Method):
    """MC-SMoE (arXiv 2310.01334). Use when: the paper's method, or experts that are redundant."""

    method: Literal["mc_smoe"] = "mc_smoe"
    # global: the paper's adaptive number per layer. uniform: the same number everywhere, safer on
    # balanced models, and the only one that the native format can hold.
    scope: Literal["global", "uniform"] = "uniform"
    min_per_layer: int = Field(default=1, ge=1)


class Frequency(_Method):
    """Keeps the most used experts, drops the others. Use when: a baseline is wanted."""

    method: Literal["frequency"] = "frequency"


class Reap(_Method):
    """REAP (arXiv 2510.13999): drops the least mean g|f|. Use when: one-shot, no recovery."""

    method: Literal["reap"] = "reap"


GroupConfig = Annotated[McSmoe | Frequency | Reap, Field(discriminator="method")]
AnyMethod = McSmoe | Frequency | Reap
METHODS: dict[str, type[AnyMethod]] = {"mc_smoe": McSmoe, "frequency": Frequency, "reap": Reap}
