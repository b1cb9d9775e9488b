"""What each width costs each layer: attached to the statistics where a budget is divided by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from models.moe import MoeCheckpoint
from orchestrator.run_folder import RunFolder
from stages.calibrate.observer import Sums
from stages.calibrate.statistics import LayerStatistics
from stages.group.config import AnyMethod, Coalesce
from stages.group.predict import predicted_curve
from stages.probe.stage import file_name, read_curve


def with_curves(
    method: AnyMethod,
    statistics: Sequence[LayerStatistics],
    sampled: Mapping[int, Sums],
    folder: RunFolder,
    moe: MoeCheckpoint,
) -> list[LayerStatistics]:
    """The statistics with a curve per layer, if the method divides its budget by one.

    Raises:
        StatisticsError: layers were not probed.
    """
    if not isinstance(method, Coalesce) or method.divide == "uniform":
        return list(statistics)
    if method.divide == "probe":
        found = {layer: read_curve(folder.probe / file_name(layer)) for layer in moe.layers}
    else:
        found = {layer: predicted_curve(sums) for layer, sums in sampled.items()}
    return [replace(each, curve=found.get(each.layer)) for each in statistics]
