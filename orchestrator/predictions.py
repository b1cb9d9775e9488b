"""What decisions are predicted to cost, from the sums of all experts on the sample, if taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from models.moe import MoeCheckpoint
from orchestrator import samples
from orchestrator.config import RunConfig
from orchestrator.run_folder import RunFolder
from stages.calibrate.observer import Sums
from stages.group.decision import LayerDecision
from stages.group.predict import expert_errors, output_energy
from stages.group.provide import subsample_sums
from stages.subsample.columns import Array
from stages.subsample.read import SubsampleStatistics


def sampled_sums(
    config: RunConfig, task: Mapping[str, float] | None, folder: RunFolder, moe: MoeCheckpoint
) -> dict[int, Sums]:
    """Layer -> sums of all experts on the sample, domains weighted by the task; may be empty."""
    paths = samples.subsamples(folder, config.calibrate, moe)
    return {
        layer: subsample_sums(SubsampleStatistics.read(path), task) for layer, path in paths.items()
    }


def predicted(decisions: Sequence[LayerDecision], sampled: Mapping[int, Sums]) -> dict[int, Array]:
    """Layer -> [E] parts of its predicted error; layers without a sample or output are missing."""
    return {
        each.layer: expert_errors(sampled[each.layer], each)
        for each in decisions
        if each.layer in sampled and output_energy(sampled[each.layer]) > 0
    }
