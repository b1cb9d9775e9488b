"""From statistics and a budget to the decision table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stages.calibrate.statistics import LayerStatistics
from stages.errors import StatisticsError
from stages.group.budget import Sizes, total_experts
from stages.group.config import AnyMethod, Coalesce, Mixed
from stages.group.decision import LayerDecision
from stages.group.divide import divide, steps
from stages.group.methods import DECIDE, mixed
from stages.group.methods.base import keep_all
from stages.group.methods.needs import curve_of
from stages.group.router_groups import join, split
from stages.group.super_experts import protect, super_experts
from stages.group.width import kept_steps, kept_width


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
    if isinstance(config, Coalesce):
        return _narrowed(config, statistics, sizes)
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


def _narrowed(
    config: Coalesce, statistics: Sequence[LayerStatistics], sizes: Sizes
) -> list[LayerDecision]:
    """Every expert stays, or as many as are asked for; all of a layer, or of the model, with the
    same number of neurons."""
    assert sizes.widths is not None
    experts, multiple = statistics[0].num_experts, config.multiple
    if config.divide == "uniform":
        width = kept_width(config.budget, experts, sizes.widths, multiple)
        return [replace(_chosen(config, each), width=width) for each in statistics]
    total = kept_steps(config.budget, experts, sizes.widths, multiple, len(statistics))
    costs = [steps(curve_of(each), sizes.widths.neurons, multiple) for each in statistics]
    if config.weigh_layers == "gain":  # costs are squared errors
        costs = [each.gain**2 * cost for each, cost in zip(statistics, costs, strict=True)]
    return [
        replace(keep_all(each), width=count * multiple)
        for each, count in zip(statistics, divide(costs, total), strict=True)
    ]


def _chosen(config: Coalesce, statistics: LayerStatistics) -> LayerDecision:
    """The experts that stay, whole."""
    kept = statistics.num_experts if config.experts is None else config.experts
    config.check(statistics.num_experts, kept)
    if kept == statistics.num_experts:
        return keep_all(statistics)
    return mixed.cheapest(Mixed(merge=False), statistics, kept)
