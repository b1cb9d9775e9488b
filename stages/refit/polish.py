"""A few gradient steps on one layer's kept experts, towards what the original layer puts out.

The closed form solves the down projections for given gate and up projections. This moves all three
together. It sees one layer's inputs and outputs only: no label, no logit, no other layer, so layers
stay independent jobs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.expert import Expert
from models.expert_function import Activation, activations, output
from stages.refit.config import PolishConfig

# Moments of Adam; the defaults of its authors.
_BETAS = (0.9, 0.999)


def polish(
    experts: Sequence[Expert],
    hidden: Tensor,
    routing: tuple[Tensor, Tensor],
    target: Tensor,
    act: Activation,
    config: PolishConfig,
) -> list[Expert]:
    """Experts in fp32 after `config.steps` steps of Adam on the mean squared output error.

    Args:
        hidden: [N, H] fp32 inputs.
        routing: ids [N, k] among `experts` (negative: gone) and gates [N, k].
        target: [N, H] outputs of the original layer.
    """
    if not config.steps:
        return list(experts)
    tuned = [_parameters(expert) for expert in experts]
    groups = [
        {"params": [tensor], "lr": config.rate * float(tensor.detach().square().mean().sqrt())}
        for each in tuned
        for tensor in each.tensors().values()
    ]
    optimiser = torch.optim.Adam(groups, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / config.steps))
    )
    generator, goal = torch.Generator().manual_seed(config.seed), target.float()
    scale = goal.square().mean().clamp(min=1e-30)
    for _ in range(config.steps):
        some = torch.randint(len(hidden), (config.batch,), generator=generator)
        ids, gates = (each[some] for each in routing)
        made = layer_output(tuned, hidden[some], ids, gates, act)
        loss = (made - goal[some]).square().mean() / scale
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        optimiser.step()
        schedule.step()
    return [expert.map(lambda tensor: tensor.detach()) for expert in tuned]


def layer_output(
    experts: Sequence[Expert], hidden: Tensor, ids: Tensor, gates: Tensor, act: Activation
) -> Tensor:
    """[N, H] fp32: the weighted sum over the chosen experts of `ids` [N, k]."""
    total = torch.zeros_like(hidden)
    for index, expert in enumerate(experts):
        tokens, choice = (ids == index).nonzero(as_tuple=True)
        if len(tokens):
            made = output(expert, activations(expert, hidden[tokens], act))
            total = total.index_add(0, tokens, made * gates[tokens, choice][:, None])
    return total


def _parameters(expert: Expert) -> Expert:
    """The same expert with tensors that collect gradients."""
    return expert.map(lambda tensor: nn.Parameter(tensor.clone()))
