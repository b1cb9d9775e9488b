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
from stages.group.router_groups import join, split
from stages.group.super_experts import describe, protect, super_experts


def decide(
    config: AnyMethod,
    statistics: Sequence[LayerStatistics],
    sizes: Sizes,
    router_groups: int = 1,
) -> list[LayerDecision]:
    """Decisions for every layer, skipped ones included, in layer order.

    With `router_groups` every group of neighbouring experts is decided as a layer of its own, so
    that all keep the same number and experts merge within their group only.

    Raises:
        BudgetError: a budget that cannot be met.
        StatisticsError: a layer that saw no token.
    """
    for each in statistics:
        if each.tokens == 0:
            raise StatisticsError(f"layer {each.layer} saw no token", "calibrate on more text")
    skipped = config.skipped([each.layer for each in statistics])
    if config.protect_super_experts:
        statistics = protect(statistics, super_experts(statistics))
    merged = [each for each in statistics if each.layer not in skipped]
    found = [keep_all(each) for each in statistics if each.layer in skipped]
    if merged:
        total = total_experts(config.budget, len(merged), merged[0].num_experts, sizes)
        if router_groups == 1:
            found += DECIDE[config.method](config, merged, total)
        else:
            parts = [part for each in merged for part in split(each, router_groups)]
            found += join(DECIDE[config.method](config, parts, total), merged, router_groups)
    return sorted(found, key=lambda decision: decision.layer)


def warnings(statistics: Sequence[LayerStatistics], config: AnyMethod | None = None) -> list[str]:
    """Experts without a token, which have no weight in a merge; super experts, if protected."""
    found = describe(statistics) if config is not None and config.protect_super_experts else []
    for each in statistics:
        unused = [e for e, count in enumerate(each.sums["selected"]) if count == 0]
        if unused:
            found.append(
                f"layer {each.layer}: experts {unused} received none of {each.tokens:,} calibration"
                " tokens; in a merge they weigh nothing (calibrate on more or other text)"
            )
    return found
