"""The second factor solved again: what the refit does, for experts stored as U V + S.

The layer's output is linear in the U of every down projection, since z = V h is known for every
token. So U is re-solved by the same ridge least squares as whole down projections are, against the
original layer's outputs less what S adds; V, S, gate and up stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.expert import Expert
from models.expert_function import activations
from models.factored import Factored, FactoredExpert
from stages.compress.layer import Seen
from stages.compress.lowrank import at_least_fp32
from stages.refit.config import RefitConfig
from stages.refit.problem import Problem
from stages.refit.solve import refit


@torch.inference_mode()
def resolve(
    experts: Sequence[FactoredExpert],
    target: Tensor,
    seen: Seen,
    judges: Tensor,
    config: RefitConfig,
) -> tuple[list[FactoredExpert], dict[str, Any]]:
    """Experts with new U of `down`, and how much closer they are to the target.

    Args:
        target: [N, H] fp64 what the layer's original experts add up to.
        judges: [N] bool, tokens that choose the strength of the ridge and are not fitted for that.
    """
    dense = [expert.dense().map(at_least_fp32) for expert in experts]
    downs = [expert.down for expert in experts]
    own = target - _known(dense, downs, seen)

    def features(index: int, some: Tensor) -> Tensor:
        return activations(dense[index], some, seen.act) @ downs[index].right.float().T

    rank = downs[0].right.shape[0]
    problem = Problem(
        inputs=seen.hidden, target=own, use=seen.use, activations=features, neurons=rank
    )
    prior = torch.cat([down.left.T.double() for down in downs])
    fit = refit(problem, prior, list(config.strengths), judges, config.joint_limit)
    solved = [
        replace(expert, down=replace(down, left=_rounded(fit.weights[problem.rows(i)], down)))
        for i, (expert, down) in enumerate(zip(experts, downs, strict=True))
    ]
    facts = {"strength": fit.strength, "before": fit.held_out_before, "after": fit.held_out_after}
    return solved, {"second_factor": facts}


def _rounded(rows: Tensor, down: Factored) -> Tensor:
    """[r, H] fp64 -> U [H, r] in its stored type."""
    return rows.T.to(down.left.dtype).contiguous()


def _known(dense: Sequence[Expert], downs: Sequence[Factored], seen: Seen) -> Tensor:
    """[N, H] fp64: what S and the output biases add, with the gates."""
    total = torch.zeros(seen.hidden.shape, dtype=torch.float64)
    for expert, down, use in zip(dense, downs, seen.use, strict=True):
        neurons = activations(expert, seen.hidden[use.tokens], seen.act)
        rest = replace(down, left=torch.zeros_like(down.left)).dense().float()
        made = neurons @ rest.T
        if expert.down_bias is not None:
            made = made + expert.down_bias
        total.index_add_(0, use.tokens, made.double() * use.gates[:, None])
    return total
