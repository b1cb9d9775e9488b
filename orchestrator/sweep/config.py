"""Config of `coalesce sweep`. Imports neither torch nor ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stages.group.config import METHODS, Budget, GroupConfig
from stages.settings import Settings

_SLOW = ("merge_moe",)


class SweepConfig(Settings):
    """Which methods are decided at which budgets. Has no part in what a run gives."""

    # Names, or `group` sections without a budget and a task; the run's `group.task` counts for all.
    # Empty: every method but merge_moe, which reads every weight.
    methods: tuple[GroupConfig, ...] = ()
    # Shares of experts (or neurons) that stay.
    ratios: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.75, 0.5, 0.25)
    # Sizes of all weight files, beside the ratios.
    target_bytes: tuple[Annotated[int, Field(gt=0)], ...] = ()
    # auto: native for what prunes or narrows, mapped for what merges, if the family allows it.
    format: Literal["auto", "native", "mapped"] = "auto"
    # Points that are built and measured: METHOD:RATIO or METHOD:BYTES.
    build: tuple[str, ...] = ()

    @field_validator("methods", mode="before")
    @classmethod
    def _sections(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [_section(entry) for entry in value]

    @property
    def compared(self) -> tuple[GroupConfig, ...]:
        """The methods that are decided."""
        every = (made() for name, made in METHODS.items() if name not in _SLOW)
        return self.methods or tuple(every)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Ratios, then bytes, as they stand in the config."""
        shares = [Budget(keep_ratio=ratio) for ratio in self.ratios]
        return (*shares, *(Budget(target_bytes=size) for size in self.target_bytes))


def _section(entry: Any) -> Any:
    if isinstance(entry, str):
        entry = {"method": entry}
    if isinstance(entry, Mapping):
        name = entry.get("method")
        if name not in METHODS:
            raise ValueError(f"{name!r} is no method; valid: {', '.join(METHODS)}")
        if entry.get("task") is not None:
            raise ValueError(f"{name}: one task counts for all methods: set group.task")
    return entry


def label(method: GroupConfig) -> str:
    """`mc_smoe scope=global`: the method and what is not default, but budget and task."""
    changed = method.model_dump(
        mode="json", exclude_defaults=True, exclude={"method", "budget", "task"}
    )
    return " ".join([method.method, *(f"{key}={value}" for key, value in changed.items())])
