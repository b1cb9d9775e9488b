"""What a user should know of a run before it starts, and no reason to refuse it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.moe import MoeCheckpoint
from stages.group.width import HALF_ALIGNED

if TYPE_CHECKING:
    from orchestrator.preflight import Variant


def notes(moe: MoeCheckpoint, copied: set[str], variants: Sequence[Variant]) -> tuple[str, ...]:
    """One line each."""
    found = []
    if copied:
        found.append(
            f"{len(copied)} tensors are copied as they are, first {min(copied)}: the model does not"
            " load them (layers that predict further tokens), and nothing in them is merged"
        )
    if moe.quantised:
        found.append("the weights were decoded; the output is not quantised")
    found += _widths(moe, variants[0])
    return tuple(found)


def _widths(moe: MoeCheckpoint, variant: Variant) -> list[str]:
    """About narrow experts that open everywhere and do not run everywhere."""
    from orchestrator.preflight import expected_decisions

    if not variant.method.narrows or variant.export.format != "native":
        return []
    width = expected_decisions(variant, moe)[0].width
    if width is None or width % HALF_ALIGNED == 0:
        return []
    return [
        f"experts of {width} neurons: in 16-bit types transformers' default kernels want a multiple"
        f" of {HALF_ALIGNED}; open the output with experts_implementation='eager', or set"
        f" group.multiple={HALF_ALIGNED}"
    ]
