"""Rows of a native router that are not the original's: drawn anew, or fitted to their groups.

A group's share of the softmax is exp of the log-sum-exp of its members' logits over the sum of all
groups'. A router whose K logits were these would choose among groups exactly as the original does
among experts; the nearest linear one is found by least squares on the layer's own inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from stages.errors import StatisticsError
from stages.export.config import ExportConfig
from stages.group.decision import LayerDecision
from stages.inputs.read import LayerInputs
from stages.refit.layer import held_out
from stages.refit.ridge import gram, ridge_of, solve

# Candidates for the ridge, in units of the mean energy of a component of what enters the layer.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_HELD_OUT = 0.2
# Relative distance between the logits that were seen and those of the router's rows, at most.
_LINEAR = 0.05
# Where config.json does not say how rows were drawn.
_RANGE = 0.02


@dataclass(frozen=True)
class RouterFit:
    """Rows [G, H] fp64 of merged groups; errors are shares of the targets' energy, held out."""

    rows: Tensor
    strength: float | None  # None: no candidate beat the rows that were there
    error_before: float
    error_after: float


def check_router(config: ExportConfig, moe: MoeCheckpoint) -> None:
    """Refuses what cannot be fitted, before anything is observed.

    Raises:
        CheckpointError: the family's router is not the softmax of one linear map.
    """
    if config.router == "least_squares" and moe.family.router_biases:
        names = ", ".join(bias.name for bias in moe.family.router_biases)
        raise CheckpointError(
            f"export.router=least_squares fits rows of a softmax router without biases;"
            f" {moe.family.model_type} has {names}",
            "set export.router=representative or mean",
        )


def settled_routers(
    config: ExportConfig,
    moe: MoeCheckpoint,
    decision: LayerDecision,
    routers: Mapping[str, Tensor],
    inputs: LayerInputs | None,
    task: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The router's tensors with the representatives' entries as the config asks, and facts.

    Args:
        routers: disk name -> weight [E, H] and biases, as stored.
        inputs: the layer's sample; needed by `least_squares` where something was merged.

    Raises:
        StatisticsError: there is no sample, or the router is not linear in it.
    """
    if config.router == "reinit":
        return _redrawn(config, moe, decision, routers), {}
    merged = [i for i, members in enumerate(decision.members) if len(members) > 1]
    if config.router != "least_squares" or not merged:
        return dict(routers), {}
    if inputs is None:
        raise StatisticsError(
            f"the router of layer {decision.layer} is to be fitted, and no inputs were sampled",
            "set calibrate.sample.tokens (4096), or export.router=mean",
        )
    name = moe.family.router_name(decision.layer)
    found = _fitted(decision, merged, routers[name], inputs, task)
    rows = routers[name].clone()
    rows[[decision.representatives[i] for i in merged]] = found.rows.to(rows.dtype)
    facts = {"router": {k: v for k, v in vars(found).items() if k != "rows"}}
    return {**routers, name: rows}, facts


def fit_rows(x: Tensor, targets: Tensor, prior: Tensor, judges: Tensor) -> RouterFit:
    """Ridge least squares centred on `prior`, its strength chosen on the tokens that judge.

    Args:
        x: [N, H] what enters the router.
        targets: [N, G] log-sum-exp of the members' logits.
        prior: [G, H] the representatives' rows.
        judges: [N] bool; they choose the strength and take part in the final solution.
    """
    wide, wanted, rows = x.double(), targets.double(), prior.double().T

    def error(candidate: Tensor) -> float:
        missed = (wide[judges] @ candidate - wanted[judges]).square().sum()
        return float(missed / wanted[judges].square().sum().clamp(min=1e-300))

    def solved(some: Tensor, strength: float) -> Tensor:
        products = gram(wide[some])
        cross = wide[some].T @ wanted[some]
        return solve(products, cross, ridge_of(products, strength), rows).weights

    before = error(rows)
    errors = {strength: error(solved(~judges, strength)) for strength in STRENGTHS}
    best = min(errors, key=lambda strength: errors[strength])
    if not errors[best] < before:
        return RouterFit(prior.double(), None, before, before)
    everyone = torch.ones_like(judges)
    return RouterFit(solved(everyone, best).T, best, before, errors[best])


def group_logits(logits: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    """[N, E] router logits -> [N, G] log-sum-exp of each group's members, fp64."""
    wide = logits.double()
    return torch.stack([wide[:, list(ids)].logsumexp(dim=1) for ids in members], dim=1)


def _fitted(
    decision: LayerDecision,
    merged: Sequence[int],
    router: Tensor,
    inputs: LayerInputs,
    task: Mapping[str, float] | None,
) -> RouterFit:
    scale = torch.ones(len(inputs), 1)
    if task is not None:
        weights = inputs.weights(task)
        inputs, scale = inputs.only(weights > 0), weights[weights > 0].sqrt()[:, None]
    _check_linear(router, inputs)
    targets = group_logits(inputs.logits, [decision.members[i] for i in merged])
    prior = router[[decision.representatives[i] for i in merged]]
    judges = held_out(inputs, _HELD_OUT)
    return fit_rows(inputs.hidden.float() * scale, targets * scale, prior, judges)


def _check_linear(router: Tensor, inputs: LayerInputs) -> None:
    expected = inputs.hidden.float() @ router.float().T
    distance = float((expected - inputs.logits).norm() / inputs.logits.norm().clamp(min=1e-30))
    if not distance <= _LINEAR:
        raise StatisticsError(
            f"the router of layer {inputs.layer} is not its rows times what enters the layer:"
            f" the logits that were seen differ by {distance:.3g} of their norm",
            "set export.router=representative or mean",
        )


def _redrawn(
    config: ExportConfig,
    moe: MoeCheckpoint,
    decision: LayerDecision,
    routers: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Normal rows for the representatives, and biases of zero; by seed and layer alone."""
    name = moe.family.router_name(decision.layer)
    kept = list(decision.representatives)
    generator = torch.Generator().manual_seed(1_000_003 * config.router_seed + decision.layer)
    spread = float(moe.checkpoint.config.get("initializer_range") or _RANGE)
    drawn = torch.randn(len(kept), routers[name].shape[1], generator=generator) * spread
    found = {other: torch.zeros_like(tensor) for other, tensor in routers.items()}
    found[name][kept] = drawn.to(found[name].dtype)
    return found
