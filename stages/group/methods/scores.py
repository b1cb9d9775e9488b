"""How much an expert matters, as published: [E] float64, keep the highest.

An expert that received no token has score 0 everywhere.
"""

from __future__ import annotations

import numpy as np

from stages.calibrate.statistics import LayerStatistics
from stages.group.methods.base import Array


def saliency(statistics: LayerStatistics) -> Array:
    """REAP (arXiv 2510.13999): mean of g|f| over the tokens routed to the expert."""
    return per_token(statistics, "gate_norm")


def per_token(statistics: LayerStatistics, name: str) -> Array:
    """A sum over an expert's tokens divided by their number."""
    selected = statistics.sums["selected"].astype(np.float64)
    total = statistics.sums[name]
    return np.asarray(np.divide(total, selected, out=np.zeros_like(selected), where=selected > 0))
