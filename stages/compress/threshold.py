"""One threshold for the S of all layers (MC-SMoE, arXiv 2310.01334, section 3.3).

The paper ranks all rows of all S together, so that some matrices lose every row and others keep
most. Here every (layer, matrix) has a curve: what keeping one more row in each of its experts is
worth, strongest first. Curves fall, so taking the steps that are worth most per byte until the
bytes are spent is the best division. The bytes are those that `threshold: layer` would take.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Numbers = dict[int, dict[str, int]]


@dataclass(frozen=True)
class Curve:
    """The rows (or columns) of S of one matrix in all experts of a layer."""

    layer: int
    matrix: str
    # [H] or [W]: what the n-th row is worth, as a share of the matrix itself, added up over the
    # experts; each expert's own strongest first, so it falls.
    gains: Array
    row_bytes: int  # of one row in every expert, and of its index
    even: int  # rows where every matrix keeps the same share


def share_out(curves: Sequence[Curve], multiple: int) -> Numbers:
    """Layer -> matrix -> rows, of together at most the bytes of the even division.

    What is left of the bytes is less than any step that is still possible. Numbers below `multiple`
    are free; from it on they are multiples of it, or all rows. Ties go to the matrix that is the
    farthest from its even share, then to the lower layer, then by name.
    """
    left = sum(curve.even * curve.row_bytes for curve in curves)
    taken = [0] * len(curves)
    steps = [_step(curve, i, 0, multiple) for i, curve in enumerate(curves) if len(curve.gains)]
    heapq.heapify(steps)
    while steps:
        *_, index, wanted = heapq.heappop(steps)
        curve = curves[index]
        cost = (wanted - taken[index]) * curve.row_bytes
        if cost > left:
            continue  # further steps of this matrix cost no less, but for a last one of fewer rows
        left, taken[index] = left - cost, wanted
        if wanted < len(curve.gains):
            heapq.heappush(steps, _step(curve, index, wanted, multiple))
    found: Numbers = {}
    for curve, rows in zip(curves, taken, strict=True):
        found.setdefault(curve.layer, {})[curve.matrix] = rows
    return found


def _step(
    curve: Curve, index: int, kept: int, multiple: int
) -> tuple[float, float, int, str, int, int]:
    """The next possible number of rows, ordered by what it is worth per byte."""
    wanted = kept + 1 if kept + 1 < multiple else (kept // multiple + 1) * multiple
    wanted = min(wanted, len(curve.gains))
    worth = float(curve.gains[kept:wanted].sum()) / ((wanted - kept) * curve.row_bytes)
    progress = wanted / curve.even if curve.even else float(wanted * len(curve.gains))
    return -worth, progress, curve.layer, curve.matrix, index, wanted
