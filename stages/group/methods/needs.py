"""What only some methods need of a layer, or the error that says how to get it."""

from __future__ import annotations

from collections.abc import Mapping

from stages.calibrate.observer import Sums
from stages.calibrate.statistics import LayerStatistics
from stages.errors import StatisticsError
from stages.group.methods.base import Array


def subsample_of(statistics: LayerStatistics) -> Sums:
    """What all experts did on the sampled tokens; arrays as in `stages.subsample.columns`.

    Raises:
        StatisticsError: nothing was sampled, or nothing of the domains of the task.
    """
    found = statistics.subsample
    if found is None:
        raise StatisticsError(
            f"layer {statistics.layer}: this method needs the outputs of all experts on sampled"
            " tokens, and none were taken",
            "set calibrate.sample.tokens (4096) and calibrate.sample.statistics=true",
        )
    if not found["sampled"].any():
        raise StatisticsError(
            f"layer {statistics.layer}: the sample holds no token of the domains that count",
            "raise calibrate.sample.tokens",
        )
    return found


def sampled_tokens(subsample: Sums) -> float:
    """Sampled tokens of a layer; a weighted number where there is a task."""
    return float(subsample["sampled"][0])


def router_of(statistics: LayerStatistics) -> Array:
    """[E, H] float64 router rows.

    Raises:
        StatisticsError: they were not attached.
    """
    if statistics.router is None:
        raise StatisticsError(
            f"layer {statistics.layer}: this method needs the router's rows",
            "attach them with stages.group.provide.provide",
        )
    return statistics.router


def weights_of(statistics: LayerStatistics) -> Array:
    """[E, E] float64 squared distances of the experts' input matrices.

    Raises:
        StatisticsError: they were not attached.
    """
    if statistics.weights is None:
        raise StatisticsError(
            f"layer {statistics.layer}: this method needs distances between experts' weights",
            "attach them with stages.group.provide.provide",
        )
    return statistics.weights


def curve_of(statistics: LayerStatistics) -> Mapping[int, float]:
    """Width -> cost of giving it to this layer alone.

    Raises:
        StatisticsError: nothing was attached.
    """
    if statistics.curve is None:
        raise StatisticsError(
            f"layer {statistics.layer}: dividing a budget needs what each width costs each layer",
            "group.divide=probe measures it in a run; group.divide=predicted needs the sums of"
            " all experts on sampled tokens (calibrate.sample)",
        )
    return statistics.curve
