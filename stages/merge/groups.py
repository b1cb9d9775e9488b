"""All groups of a layer, each merged into one expert: by averaging, or by pooling neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.expert import Expert
from models.expert_function import activation, check_function
from models.moe import MoeCheckpoint
from stages.align.config import AlignConfig
from stages.align.matching import align, squared_distance
from stages.align.sample import Seen
from stages.group.decision import LayerDecision
from stages.inputs.read import LayerInputs
from stages.merge.config import MergeConfig
from stages.merge.mean import merge
from stages.merge.neurons import pool
from stages.narrow.config import NarrowConfig

# Tokens on which the known expert function is compared with the family's own.
_COMPARED = 16


def merge_groups(
    moe: MoeCheckpoint,
    decision: LayerDecision,
    align_config: AlignConfig,
    config: MergeConfig,
    seen: Seen | None = None,
) -> tuple[list[Expert], dict[str, float]]:
    """One expert per group, and the squared distances to the representatives.

    Only the members of one group are held beside the results.

    Args:
        seen: what an expert's neurons do on sampled tokens; needed where weights do not decide.
    """
    merged: list[Expert] = []
    before = after = 0.0
    for representative, members in zip(decision.representatives, decision.members, strict=True):
        experts = dict(zip(members, moe.read_experts(decision.layer, list(members)), strict=True))
        reference = experts[representative]
        watched = None if seen is None or len(members) == 1 else seen(reference)
        for expert in members:
            if expert == representative:
                continue
            before += squared_distance(reference, experts[expert])
            if align_config.enabled:
                target = experts[expert]
                both = None if seen is None or watched is None else (watched, seen(target))
                experts[expert] = align(reference, target, align_config.by, both)
            after += squared_distance(reference, experts[expert])
        uniform = config.weights == "uniform"
        weights = [1.0 if uniform else decision.weight[expert] for expert in members]
        merged.append(merge([experts[expert] for expert in members], weights))
    return merged, {"distance_before": before, "distance_after": after}


def pool_groups(
    moe: MoeCheckpoint,
    decision: LayerDecision,
    align_config: AlignConfig,
    config: MergeConfig,
    narrow: NarrowConfig,
    inputs: LayerInputs,
    task: Mapping[str, float] | None,
) -> tuple[list[Expert], dict[str, Any]]:
    """One expert per group, of its members' best neurons; averaged where too few tokens came.

    Args:
        inputs: the layer's sample; `task` weighs its domains.

    Raises:
        CheckpointError: the family's experts compute a function that is not known here.
    """
    check_function(moe, decision.layer, inputs.hidden[:_COMPARED])
    inputs = _counted(inputs, task)
    hidden, act = inputs.hidden.float(), activation(moe.checkpoint.config)
    merged, averaged, error, energy = list[Expert](), list[int](), 0.0, 0.0
    for group, members in enumerate(decision.members):
        found = None
        if len(members) > 1:
            experts = moe.read_experts(decision.layer, list(members))
            routing = _among(members, moe.num_experts, inputs)
            shares, keep = [decision.weight[m] for m in members], experts[0].neurons
            found = pool(experts, hidden, routing, shares, act, keep, narrow.ridge)
        if found is not None:
            merged.append(found.expert)
            error, energy = error + found.error, energy + found.energy
            continue
        merged += merge_groups(moe, _alone(decision, group), align_config, config)[0]
        averaged += [group] if len(members) > 1 else []
    return merged, {"pool_error": error / max(energy, 1e-300), "averaged_groups": averaged}


def _among(members: tuple[int, ...], experts: int, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    """Routing with members numbered from 0 and every other expert -1."""
    place = torch.full((experts,), -1)
    place[list(members)] = torch.arange(len(members))
    return place[inputs.ids], inputs.gates


def _alone(decision: LayerDecision, group: int) -> LayerDecision:
    """One group of a decision, as if all other experts were dropped."""
    return replace(
        decision,
        group=tuple(0 if each == group else None for each in decision.group),
        representatives=(decision.representatives[group],),
    )


def _counted(inputs: LayerInputs, task: Mapping[str, float] | None) -> LayerInputs:
    """Tokens that count; squares over one count w times if its gates are scaled by sqrt w."""
    if task is None:
        return inputs
    weights = inputs.weights(dict(task))
    inputs, weights = inputs.only(weights > 0), weights[weights > 0]
    return replace(inputs, gates=inputs.gates * weights.sqrt()[:, None])
