"""Units run in this process, one after another: what benchmarks hand to `orchestrator.chain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stages.unit import execute


def run_here(
    stage: str,
    units: Sequence[Any],
    run_one: Callable[[Any], dict[str, Any]],
    memory_bytes: int,
) -> None:
    """See `chain.Schedule`."""
    for unit in units:
        execute(unit, run_one)
