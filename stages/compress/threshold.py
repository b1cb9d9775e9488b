"""One threshold for the S of all layers (MC-SMoE, arXiv 2310.01334, section 3.3).

The paper ranks all rows of all S together, so that some matrices lose every row and others keep
most. Here every (layer, matrix) has a curve: what keeping one more row in each of its experts is
worth, strongest first. Curves fall, so taking the steps that are worth most per byte until the
bytes are spent is the best division. The bytes are those that `threshold: layer` would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
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


def share_out(curves: Sequence[Curve], multiple: int, budget: int | None = None) -> Numbers:
    """Layer -> matrix -> rows, of together at most `budget` bytes; None: of the even division.

    What is left of the bytes is less than any step that is still possible. Numbers below `multiple`
    are free; from it on they are multiples of it, or all rows. Ties go to the matrix that is the
    farthest from its even share, then to the lower layer, then by name.
    """
    left = sum(curve.even * curve.row_bytes for curve in curves) if budget is None else budget
    ranked = sorted(curves, key=lambda curve: (curve.layer, curve.matrix))
    worth, progress, wanted, cost, owner = _steps(ranked, multiple)
    order = np.lexsort((owner, progress, -worth))
    wanted, cost, owner = wanted[order], cost[order], owner[order]
    taken = np.zeros(len(ranked), dtype=np.int64)
    first = int((np.cumsum(cost) <= left).sum())  # all of these fit
    np.maximum.at(taken, owner[:first], wanted[:first])
    left -= int(cost[:first].sum())
    closed: set[int] = set()
    for who, rows, price in zip(*(x[first:].tolist() for x in (owner, wanted, cost)), strict=True):
        if len(closed) == len(ranked):
            break
        if who in closed or price > left:
            # Further steps cost no less, but for a last one of fewer rows.
            closed.add(who)
            continue
        left, taken[who] = left - price, rows
    found: Numbers = {}
    for curve, rows in zip(ranked, taken.tolist(), strict=True):
        found.setdefault(curve.layer, {})[curve.matrix] = rows
    return found


def _steps(curves: Sequence[Curve], multiple: int) -> tuple[Array, Array, Counts, Counts, Counts]:
    """Of every possible number of rows of every matrix: what the step to it is worth per byte, how
    far from the even share it leads, the number, the bytes of the step, and the matrix."""
    parts: list[tuple[Array, Array, Counts, Counts, Counts]] = []
    for index, curve in enumerate(curves):
        size = len(curve.gains)
        edges = sorted({*range(min(multiple, size + 1)), *range(0, size, multiple), size})
        ends = np.array(edges[1:], dtype=np.int64)
        if not len(ends):
            continue
        cost: Counts = (ends - np.array(edges[:-1], dtype=np.int64)) * curve.row_bytes
        worth = np.add.reduceat(curve.gains, edges[:-1]) / cost
        # Curves fall; sums of them fall but for rounding.
        worth = np.minimum.accumulate(worth)
        progress: Array = ends / (curve.even or 1 / size)
        parts.append((worth, progress, ends, cost, np.full(len(ends), index)))
    if not parts:
        nothing = np.zeros(0, dtype=np.int64)
        return nothing.astype(float), nothing.astype(float), nothing, nothing, nothing
    joined = [np.concatenate(each) for each in zip(*parts, strict=True)]
    return joined[0], joined[1], joined[2], joined[3], joined[4]
