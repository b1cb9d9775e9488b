"""From statistics to what becomes of every expert of a variant, checked against its format."""

from __future__ import annotations

from collections.abc import Sequence

from models.moe import MoeCheckpoint
from orchestrator.config import RunConfig
from orchestrator.preflight import Variant
from stages.align.reference import with_references
from stages.calibrate.statistics import LayerStatistics
from stages.export.formats import FORMATS
from stages.export.layout import router_groups, sizes
from stages.group import stage as group
from stages.group.decision import LayerDecision
from stages.merge.weights import with_weights


def decide(
    config: RunConfig,
    variant: Variant,
    statistics: Sequence[LayerStatistics],
    moe: MoeCheckpoint,
) -> list[LayerDecision]:
    """Decisions with the references and merge weights of the config.

    Args:
        statistics: with everything attached that the method decides by.

    Raises:
        BudgetError: a budget that cannot be met, or decisions that the format cannot hold.
        StatisticsError: something is missing that the method decides by.
    """
    form = variant.export
    groups = router_groups(moe, form)
    decisions = group.decide(
        variant.method, statistics, sizes(moe, form, variant.method.left), groups
    )
    decisions = with_references(decisions, statistics, config.align)
    decisions = with_weights(decisions, statistics, config.merge)
    FORMATS[form.format].check(moe, decisions)
    return decisions
