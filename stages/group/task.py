"""From one observation with domains to the statistics of a task: domains weighted before deciding.

Sums are additive, so a weight per domain is all that specialising takes (UNCURL's task data, for
any mixture, without observing again).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa

from stages.calibrate.observer import Sums
from stages.calibrate.statistics import LayerStatistics, domain_sums, layers_of
from stages.errors import StatisticsError


def task_layers(table: pa.Table, task: Mapping[str, float] | None) -> list[LayerStatistics]:
    """One entry per layer, ascending: the sum of weight x sums over the domains of the task.

    Domains that the task does not name count nothing, and the largest weight counts as 1. Without
    a task this is `layers_of`. The largest activation is that of the domains that count; arrays
    are float64.

    Raises:
        StatisticsError: a domain that was not observed.
    """
    if task is None:
        return layers_of(table)
    observed = set(table["domain"].unique().to_pylist())
    check_task(task, observed)
    weights = domain_weights(task, observed)
    found: dict[int, Sums] = {}
    for (domain, layer), sums in sorted(domain_sums(table).items()):
        if weight := weights[domain]:
            total = found.setdefault(layer, {name: np.zeros(v.shape) for name, v in sums.items()})
            _add(total, sums, weight)
    return [LayerStatistics(layer, sums) for layer, sums in sorted(found.items())]


def check_task(task: Mapping[str, float], observed: Collection[str]) -> None:
    """Refuses domains that do not exist.

    Raises:
        StatisticsError: naming them, and those that were observed.
    """
    if unknown := sorted(set(task) - set(observed)):
        raise StatisticsError(
            f"task names {', '.join(unknown)}; the calibration text has the domains"
            f" {', '.join(sorted(observed))}",
            "correct `group.task`, or calibrate on text with these domains",
        )


def domain_weights(task: Mapping[str, float], observed: Collection[str]) -> dict[str, float]:
    """A weight for every observed domain, the largest 1; 0 for those that the task leaves out."""
    largest = max(task.values())
    return {domain: task.get(domain, 0.0) / largest for domain in observed}


def _add(total: Sums, sums: Sums, weight: float) -> None:
    for name, values in sums.items():
        if name == "max_abs":
            np.maximum(total[name], values, out=total[name])
        else:
            total[name] += weight * values
