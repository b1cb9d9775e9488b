"""Attaches to the statistics what the chosen method needs beside routing sums, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.expert import Expert
from models.moe import MoeCheckpoint
from stages.calibrate.observer import Sums
from stages.calibrate.statistics import LayerStatistics
from stages.group.clusters import squared_distances
from stages.group.config import Need
from stages.group.task import domain_weights
from stages.subsample.read import SubsampleStatistics

# Bytes of float64 that are compared at a time.
_CHUNK_BYTES = 64 << 20


def provide(
    needs: Collection[Need],
    statistics: Sequence[LayerStatistics],
    moe: MoeCheckpoint,
    subsample: Mapping[int, Sums],
) -> list[LayerStatistics]:
    """The statistics with what was asked for.

    Args:
        needs: `config.needs` of the method, and what the merge asks for.
        subsample: layer -> what all experts did on sampled tokens (`subsample_sums`); a layer that
            is missing stays without, and the method says so.
    """
    return [_provided(needs, each, moe, subsample.get(each.layer)) for each in statistics]


def _provided(
    needs: Collection[Need],
    statistics: LayerStatistics,
    moe: MoeCheckpoint,
    subsample: Sums | None,
) -> LayerStatistics:
    layer = statistics.layer
    if "subsample" in needs:
        statistics = replace(statistics, subsample=subsample)
    if "router" in needs:
        rows = moe.read_router(layer).double().numpy(force=True)
        statistics = replace(statistics, router=rows)
    if "gain" in needs:
        gains = moe.family.error_gains(moe.checkpoint.config)
        statistics = replace(statistics, gain=gains.get(layer, 1.0))
    if "weights" in needs:
        experts = moe.read_experts(layer, list(range(moe.num_experts)))
        statistics = replace(statistics, weights=input_distances(experts))
    return statistics


def subsample_sums(subsample: SubsampleStatistics, task: Mapping[str, float] | None) -> Sums:
    """Summed over domains, weighted as `task.task_layers` weights routing sums."""
    if task is None:
        return subsample.summed()
    return subsample.summed(domain_weights(task, subsample.domains))


def input_distances(experts: Sequence[Expert]) -> np.ndarray[Any, Any]:
    """[E, E] float64 squared distances of gate and up matrices and their biases, in stored order.

    Chunks of the neurons' rows are compared in float64: near copies have tiny distances.
    """
    rows = [_inputs(expert) for expert in experts]  # E x [R, H + 1]
    count, width = rows[0].shape
    step = max(1, _CHUNK_BYTES // (8 * width * len(rows)))
    # Differences to the mean keep the inner products small, and with them what cancels below.
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, count, step):
        block = torch.stack([each[start : start + step].double().reshape(-1) for each in rows])
        block -= block.mean(dim=0)
        gram += block @ block.T
    return squared_distances(gram.numpy(force=True))


def _inputs(expert: Expert) -> Tensor:
    """[R, H + 1]: gate and up with their biases (0 where there are none) as last column."""
    pairs = [(expert.gate, expert.gate_bias), (expert.up, expert.up_bias)]
    return torch.cat([_with_bias(m, bias) for m, bias in pairs if m is not None])


def _with_bias(matrix: Tensor, bias: Tensor | None) -> Tensor:
    column = matrix.new_zeros(matrix.shape[0]) if bias is None else bias
    return torch.cat([matrix, column.unsqueeze(1)], dim=1)
