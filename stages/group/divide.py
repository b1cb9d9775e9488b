"""One budget divided between layers by what each size costs each layer. Exact, not greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.errors import BudgetError

Array = np.ndarray[Any, Any]


def divide(costs: Sequence[Array], total: int) -> list[int]:
    """The sizes with the least sum of costs that together do not exceed `total`.

    Dynamic programming over (layer, size used so far): L x total x S additions. Between equals
    the smaller sizes of the later layers win.

    Args:
        costs: per layer [S_l + 1] float64: the cost of size 0, 1, ..., S_l; inf where a size is not
            allowed.

    Raises:
        BudgetError: not even the smallest allowed sizes fit.
    """
    best = np.zeros(total + 1)  # least cost of the layers so far at exactly this total or less
    chosen: list[Array] = []
    for cost in costs:
        found, sizes = np.full(total + 1, np.inf), np.zeros(total + 1, np.int64)
        for size in np.flatnonzero(np.isfinite(cost[: total + 1])):
            here = best[: total + 1 - size] + cost[size]
            better = here < found[size:]
            found[size:][better], sizes[size:][better] = here[better], size
        best = found
        chosen.append(sizes)
    if not np.isfinite(best[total]):
        least = sum(int(np.flatnonzero(np.isfinite(cost))[0]) for cost in costs)
        raise BudgetError(
            f"the budget leaves {total} steps for {len(costs)} layers, which need {least} at least",
            "raise the budget, or probe smaller sizes",
        )
    kept = []
    for sizes in reversed(chosen):
        kept.append(int(sizes[total]))
        total -= kept[-1]
    return kept[::-1]


def steps(curve: Mapping[int, float], full: int, step: int) -> Array:
    """[full // step + 1] the cost of 0, step, 2 step, ... neurons; inf below the smallest known.

    Between known sizes the cost is interpolated in a straight line, and it never falls with fewer
    neurons: noise of a measurement must not make a smaller layer look better. All neurons cost
    nothing.
    """
    known = dict(curve) | {full: 0.0}
    sizes = np.array(sorted(known))
    values = np.maximum.accumulate(np.array([known[s] for s in sizes])[::-1])[::-1]
    wanted = np.arange(full // step + 1) * step
    found = np.interp(wanted, sizes, values)
    found[wanted < sizes[0]] = np.inf
    found[0] = np.inf  # a layer without neurons is no layer
    return np.asarray(found)
