"""Merging at neuron level: the neurons of all members pooled, the best I of them kept and solved.

A group hands its tokens to one expert, under the sum G of its members' gates. With the gated
activations h_m of every member m, and f_m = W_m h_m what it puts out (biases left aside),

    min |sum_m g_m f_m - W' (G h)|^2        h: the activations of all M I neurons side by side

is solved for W by ridge least squares, then neurons go by second-order saliency
(`stages.narrow.surgeon`) until I are left. Nothing is averaged, so nothing needs to be aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.expert import Expert
from models.expert_function import Activation, activations
from stages.merge.mean import weighted_mean
from stages.narrow.surgeon import narrow
from stages.refit.ridge import ridge_of, solve, squared_error
from stages.refit.usage import Usage, usage

# Tokens whose pooled activations lie in memory at once.
_CHUNK = 2048


@dataclass(frozen=True)
class Pooled:
    """One expert for a group, and what it loses on the group's tokens."""

    expert: Expert
    members: Tensor  # [I'] int64: which member each neuron was
    error: float  # squared error of the group's output, ridge included
    energy: float  # squared output of the group before


def pool(
    experts: Sequence[Expert],
    hidden: Tensor,
    routing: tuple[Tensor, Tensor],
    weights: Sequence[float],
    act: Activation,
    keep: int,
    ridge: float,
) -> Pooled | None:
    """The best `keep` neurons of all members; None: fewer tokens than that were sent to the group.

    Args:
        experts: M members, in their stored type; all have as many neurons.
        hidden: [N, H] fp32, what enters the layer.
        routing: ids [N, k] among the members (negative: another expert) and gates [N, k].
        weights: [M] merge weights, which only biases of the output are averaged by.
        ridge: in units of the mean energy of a neuron, for solving and for removing.
    """
    wide = [expert.map(Tensor.float) for expert in experts]
    use = usage(*routing, len(wide))
    tokens = torch.unique(torch.cat([each.tokens for each in use]))
    if len(tokens) < keep:
        return None
    gram, cross, energy = _sums(wide, hidden, use, tokens, act)
    prior = torch.cat([e.down.T.double() * s for e, s in zip(wide, _shares(use), strict=True)])
    rows = solve(gram, cross, ridge_of(gram, ridge), prior).weights
    whole = squared_error(gram, cross, energy, rows)
    found = narrow(gram, rows, keep, ridge)
    origin = torch.arange(len(wide)).repeat_interleave(wide[0].neurons)
    kind = experts[0].down.dtype
    expert = replace(_beside(wide).select(found.kept), down=found.rows.T.float().contiguous())
    if experts[0].down_bias is not None:
        biases = [each.down_bias for each in wide if each.down_bias is not None]
        expert = replace(expert, down_bias=weighted_mean(biases, weights))
    expert = expert.map(lambda tensor: tensor.to(kind))
    return Pooled(expert, origin[found.kept], whole + found.error, energy)


def _sums(
    experts: Sequence[Expert], x: Tensor, use: Sequence[Usage], tokens: Tensor, act: Activation
) -> tuple[Tensor, Tensor, float]:
    """Gram [M I, M I] of the pooled neurons under the group's gate, products with its output
    [M I, H], and that output's energy; fp64."""
    size, energy = len(experts) * experts[0].neurons, 0.0
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, x.shape[1], dtype=torch.float64)
    gates = torch.zeros(len(x), len(experts), dtype=torch.float64)
    for member, each in enumerate(use):
        gates[each.tokens, member] = each.gates
    for some in torch.split(tokens, _CHUNK):
        neurons = [activations(expert, x[some], act).double() for expert in experts]
        goal = sum(
            (gates[some, member, None] * made) @ expert.down.T.double()
            for member, (expert, made) in enumerate(zip(experts, neurons, strict=True))
        )
        assert isinstance(goal, Tensor)
        features = torch.cat(neurons, dim=1) * gates[some].sum(dim=1, keepdim=True)
        gram += features.T @ features
        cross += features.T @ goal
        energy += float(goal.square().sum())
    return gram, cross, energy


def _shares(use: Sequence[Usage]) -> list[float]:
    """Each member's part of the group's gates: what a neuron counts before anything is solved."""
    sums = [float(each.gates.sum()) for each in use]
    return [each / sum(sums) for each in sums]


def _beside(experts: Sequence[Expert]) -> Expert:
    """One expert of M I neurons that holds those of all members, in their order."""
    parts = [each.tensors() for each in experts]
    joined = {
        name: torch.cat([part[name] for part in parts], dim=1 if name == "down" else 0)
        for name in parts[0]
        if name != "down_bias"
    }
    return Expert(**joined)
