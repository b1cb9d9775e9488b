"""From statistics and a budget to the decision table."""

from __future__ import annotations

from collections.abc import Sequence

from stages.calibrate.statistics import LayerStatistics
from stages.errors import StatisticsError
from stages.group.budget import Sizes, total_experts
from stages.group.config import AnyMethod
from stages.group.decision import LayerDecision
from stages.group.methods import DECIDE
from stages.group.methods.base import keep_all


def decide(
    config: AnyMethod, statistics: Sequence[LayerStatistics], sizes: Sizes
) -> list[LayerDecision]:
    """Decisions for every layer, skipped ones included, in layer order.

    Raises:
        BudgetError: a budget that cannot be met.
        StatisticsError: a layer that saw no token.
    """
    for each in statistics:
        if each.tokens == 0:
            raise StatisticsError(f"layer {each.layer} saw no token", "calibrate on more text")
    skipped = set(config.skip_layers)
    merged = [each for each in statistics if each.layer not in skipped]
    found = [keep_all(each) for each in statistics if each.layer in skipped]
    if merged:
        total = total_experts(config.budget, len(merged), merged[0].num_experts, sizes)
        found += DECIDE[config.method](config, merged, total)
    return sorted(found, key=lambda decision: decision.layer)
