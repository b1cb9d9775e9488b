"""NAEE (arXiv 2402.14800): of all subsets of K experts, the one that best keeps the layer's output.

The paper evaluates the layer once per subset. Here the error of a subset is predicted from pair
sums: each dropped expert i hands its tokens, with their gates, to the kept expert j that changes
the output least, at the cost of sum g_i^2 |f_i - f_j|^2 over the sampled tokens. The router's own
second choice may cost more, so this is the error of the best fixed replacement, not of rerouting.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.config import Naee
from stages.group.decision import LayerDecision
from stages.group.methods.base import Array, evenly, keep_only
from stages.group.methods.needs import subsample_of

# Values of one chunk of subsets: float64.
_CHUNK = 4_000_000


def decide(config: Naee, statistics: Sequence[LayerStatistics], total: int) -> list[LayerDecision]:
    """The same number of experts in every layer; see `base.Decide`."""
    return evenly(
        statistics,
        total,
        lambda each, kept: keep_only(each, best_subset(config, each, kept)),
    )


def best_subset(config: Naee, statistics: LayerStatistics, kept: int) -> list[int]:
    """The subset with the least predicted error; between equals the first in order of ids.

    Raises:
        BudgetError: there are too many subsets to try.
    """
    count = statistics.num_experts
    config.check(count, kept)
    cost = replacement_cost(statistics)
    chosen = np.array(list(combinations(range(count), kept)))  # [S, K]
    size = max(1, _CHUNK // (count * kept))
    errors = [
        cost[:, chosen[start : start + size]].min(axis=2).sum(axis=0)
        for start in range(0, len(chosen), size)
    ]
    return [int(expert) for expert in chosen[np.argmin(np.concatenate(errors))]]


def replacement_cost(statistics: LayerStatistics) -> Array:
    """[E, E] error of handing the tokens of i (row) to j (column); zeros on the diagonal."""
    return subsample_of(statistics)["swap"]
