"""Experts whose outputs hold massive activations (arXiv 2507.23279).

A handful of experts produce the extreme components that attention sinks rest on. A model that lost
them, or whose merge averaged them away, may write nonsense while every mean looks good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.config import AnyMethod

# Both bounds are the source's: above nearly all experts, and of the order of the largest.
_PERCENTILE = 99.5
_SHARE_OF_MAXIMUM = 0.1


def super_experts(statistics: Sequence[LayerStatistics]) -> dict[int, tuple[int, ...]]:
    """Layer -> its super experts, ascending; layers without any are left out.

    The largest absolute component of an expert's output lies above the 99.5th percentile of all
    experts of the model and above a tenth of the largest. The source's third condition, that the
    layer forms massive activations, needs the residual stream and is not applied. Of fewer than
    about 200 experts, the percentile alone names the one largest.
    """
    largest = {each.layer: each.sums["max_abs"] for each in statistics}
    everything = np.concatenate(list(largest.values()))
    bound = max(np.percentile(everything, _PERCENTILE), _SHARE_OF_MAXIMUM * everything.max())
    found = {layer: np.flatnonzero(values > bound) for layer, values in largest.items()}
    return {layer: tuple(ids.tolist()) for layer, ids in found.items() if len(ids)}


def protect(
    statistics: Sequence[LayerStatistics], protected: dict[int, tuple[int, ...]]
) -> list[LayerStatistics]:
    """The same statistics with the experts that must stay as they are."""
    return [replace(each, protected=protected.get(each.layer, ())) for each in statistics]


def protected_lines(statistics: Sequence[LayerStatistics], config: AnyMethod) -> list[str]:
    """What a report says of super experts, if the method protects them."""
    return describe(statistics) if config.protect_super_experts else []


def describe(statistics: Sequence[LayerStatistics]) -> list[str]:
    """One line per layer with super experts, and their largest activations."""
    by_layer = {each.layer: each.sums["max_abs"] for each in statistics}
    everything = np.concatenate(list(by_layer.values()))
    return [
        f"layer {layer}: super experts {list(ids)} are kept as they are (largest activation"
        f" {', '.join(f'{by_layer[layer][e]:.4g}' for e in ids)}; median of all experts"
        f" {np.median(everything):.4g})"
        for layer, ids in sorted(super_experts(statistics).items())
    ]
