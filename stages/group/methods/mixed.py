"""Keep, merge or drop, expert by expert: whatever costs the layer's output least, by exact sums.

From E units of one expert each, the cheapest step is taken until K are left:

    merge two units    sum |g_i f_i + g_j f_j - (g_i + g_j) F|^2, F their best mean: C - B^2 / A
    drop a unit        what |sum over all dropped of g f|^2 grows by: no token is routed anew

Both are exact for pairs (`stages.subsample.pairs`, `gated_gram`); units of more than two members
are estimated as in `stages.group.predict`. Greedy, so that the sum need not be the least there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stages.calibrate.observer import Sums
from stages.calibrate.statistics import LayerStatistics
from stages.group.config import Mixed
from stages.group.decision import LayerDecision, from_labels
from stages.group.methods.base import Array, evenly
from stages.group.methods.needs import subsample_of
from stages.group.predict import group_errors, output_energy
from stages.merge.weights import pairwise_alpha
from stages.subsample.pairs import pair_errors

Unit = tuple[int, ...]


def decide(config: Mixed, statistics: Sequence[LayerStatistics], total: int) -> list[LayerDecision]:
    """The same number of experts in every layer; see `base.Decide`."""
    return evenly(statistics, total, lambda each, kept: cheapest(config, each, kept))


def cheapest(config: Mixed, statistics: LayerStatistics, kept: int) -> LayerDecision:
    """One layer, step by step; between equals dropping and the lower ids go first.

    Raises:
        BudgetError: groups of the given size cannot hold all experts, and none may be dropped.
    """
    config.check(statistics.num_experts, kept)
    layer = _Layer(config, subsample_of(statistics), statistics.num_experts)
    while len(layer.units) > kept:
        layer.step()
    labels: list[int | None] = [None] * statistics.num_experts
    weight = np.ones(statistics.num_experts)
    for unit in layer.units:
        ids = np.array(unit)
        chosen = int(ids[np.argmax(statistics.frequency[ids])])
        weight[ids] = layer.weights(unit)
        for expert in unit:
            labels[expert] = chosen
    return from_labels(statistics.layer, labels, weight.tolist())


@dataclass
class _Layer:
    """The units that are left, and what every step from here would cost."""

    config: Mixed
    sums: Sums
    experts: int
    units: list[Unit] = field(init=False)
    dropped: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.units = [(expert,) for expert in range(self.experts)]
        self._error: dict[Unit, float] = dict.fromkeys(self.units, 0.0)
        self._pair = pair_errors(self.sums["swap"], self.sums["both"]).merge
        self._size = self.config.group_size or self.experts

    def step(self) -> None:
        """Takes the cheapest step."""
        scale = output_energy(self.sums) or 1.0
        steps = [*self._merges(), *self._drops()]
        # Rounding must not decide between equals, such as experts that nothing was sent to.
        _, _, units = min((round(cost / scale, 12), kind, units) for cost, kind, units in steps)
        self.units = sorted(unit for unit in self.units if unit not in units)
        if len(units) == 2:
            self.units = sorted([*self.units, tuple(sorted(units[0] + units[1]))])
        else:
            self.dropped += units[0]

    def weights(self, unit: Unit) -> Array:
        """[M] merge weights of a unit's members; their sum is 1."""
        return pairwise_alpha(self.sums["swap"], self.sums["both"], unit)

    def _merges(self) -> list[tuple[float, int, tuple[Unit, ...]]]:
        if not self.config.merge:
            return []
        return [
            (self.error(tuple(sorted(a + b))) - self.error(a) - self.error(b), 1, (a, b))
            for index, a in enumerate(self.units)
            for b in self.units[index + 1 :]
            if len(a) + len(b) <= self._size
        ]

    def _drops(self) -> list[tuple[float, int, tuple[Unit, ...]]]:
        if not self.config.drop:
            return []
        gram = self.sums["gated_gram"]
        beside = gram[:, self.dropped].sum(axis=1)
        return [
            (_sum(gram, unit) + 2 * float(beside[list(unit)].sum()) - self.error(unit), 0, (unit,))
            for unit in self.units
        ]

    def error(self, unit: Unit) -> float:
        """What a unit's members lose by sharing one output."""
        if unit not in self._error:
            self._error[unit] = (
                float(self._pair[unit])
                if len(unit) == 2
                else float(group_errors(self.sums, list(unit), self.weights(unit)).sum())
            )
        return self._error[unit]


def _sum(gram: Array, unit: Unit) -> float:
    return float(gram[np.ix_(unit, unit)].sum())
