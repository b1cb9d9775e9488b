"""The member of each group that the others are aligned to: its representative."""

from __future__ import annotations

from collections.abc import Sequence

from stages.align.config import AlignConfig
from stages.calibrate.statistics import LayerStatistics
from stages.group.decision import LayerDecision, from_labels
from stages.group.methods.scores import saliency


def with_references(
    decisions: Sequence[LayerDecision],
    statistics: Sequence[LayerStatistics],
    config: AlignConfig,
) -> list[LayerDecision]:
    """The same groups around the representatives that the config asks for; ties: the lower id."""
    if config.reference == "method":
        return list(decisions)
    by_layer = {each.layer: each for each in statistics}
    return [_around(each, by_layer[each.layer], config) for each in decisions]


def _around(
    decision: LayerDecision, statistics: LayerStatistics, config: AlignConfig
) -> LayerDecision:
    frequent = config.reference == "most_frequent"
    score = statistics.frequency if frequent else saliency(statistics)
    chosen = [max(members, key=lambda e: (score[e], -e)) for members in decision.members]
    labels = [None if group is None else chosen[group] for group in decision.group]
    return from_labels(decision.layer, labels, decision.weight)
