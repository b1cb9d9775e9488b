"""A few gradient steps on one layer's kept experts, towards what the original layer puts out.

The closed form solves the down projections for given gate and up projections. This moves all three
together. It sees one layer's inputs and what its outputs are to be (`stages/refit/goal.py`): no
label and no weight of another layer, so layers stay independent jobs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn

from models.expert import Expert
from models.expert_function import Activation, activations, output
from stages.refit.config import PolishConfig
from stages.refit.goal import Goal

# Moments of Adam; the defaults of its authors.
_BETAS = (0.9, 0.999)
# Rows of all experts, padded to the longest, over those that are needed.
_PADDED = 2


def polish(
    experts: Sequence[Expert],
    hidden: Tensor,
    routing: tuple[Tensor, Tensor],
    goal: Goal,
    act: Activation,
    config: PolishConfig,
) -> list[Expert]:
    """Experts in fp32 after `config.steps` steps of Adam on what they are off.

    Args:
        hidden: [N, H] fp32 inputs.
        routing: ids [N, k] among `experts` (negative: gone) and gates [N, k].
        goal: of the same N tokens.
    """
    if not config.steps:
        return list(experts)
    tuned = {name: nn.Parameter(torch.stack(each)) for name, each in _columns(experts).items()}
    optimiser = torch.optim.Adam(_groups(tuned, config.rate), betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / config.steps))
    )
    for some in _batches(len(hidden), config):
        ids, gates = (each[some] for each in routing)
        made = stacked_output(Expert(**tuned), hidden[some], ids, gates, act)
        loss = goal.loss(made, some)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        optimiser.step()
        schedule.step()
    parts = {name: each.detach().unbind() for name, each in tuned.items()}
    return [
        Expert(**{name: each[index] for name, each in parts.items()})
        for index in range(len(experts))
    ]


def _columns(experts: Sequence[Expert]) -> dict[str, list[Tensor]]:
    """Field -> that tensor of every expert."""
    each = [expert.tensors() for expert in experts]
    return {name: [tensors[name] for tensors in each] for name in each[0]}


def _groups(tuned: dict[str, nn.Parameter], rate: float) -> list[dict[str, object]]:
    """Adam moves every entry alike: the step fits the size of the tensor."""
    sizes = {name: float(each.detach().square().mean().sqrt()) for name, each in tuned.items()}
    return [{"params": [each], "lr": rate * sizes[name]} for name, each in tuned.items()]


def _batches(tokens: int, config: PolishConfig) -> Iterator[Tensor]:
    """Indices [n] for each step: every token once before any comes again."""
    generator, left = torch.Generator().manual_seed(config.seed), torch.empty(0, dtype=torch.long)
    size = min(config.batch, tokens)
    for _ in range(config.steps):
        if len(left) < size:
            left = torch.randperm(tokens, generator=generator)
        yield left[:size]
        left = left[size:]


def stacked_output(
    experts: Expert, hidden: Tensor, ids: Tensor, gates: Tensor, act: Activation
) -> Tensor:
    """As `layer_output`, for experts that lie in one tensor each, [K, I, H]: one product for all.

    Every expert's tokens are padded to those of the busiest, unless that doubles the work.
    """
    count, top = len(experts.up), ids.shape[1]
    flat, shares = ids.reshape(-1), gates.reshape(-1)
    order = flat.argsort(stable=True)
    order = order[int((flat < 0).sum()) :]  # ids of experts that are gone come first
    tokens, share = order // top, shares[order]
    hits = torch.bincount(flat[order], minlength=count)
    longest = max(int(hits.max()), 1)
    if longest * count > _PADDED * len(order):
        made = _one_by_one(experts, hidden[tokens], hits.tolist(), act)
    else:
        starts = hits.cumsum(0) - hits
        slot = flat[order] * longest + torch.arange(len(order)) - starts[flat[order]]
        padded = hidden.new_zeros(count * longest, hidden.shape[1])
        padded = padded.index_copy(0, slot, hidden[tokens]).view(count, longest, -1)
        gate = None if experts.gate is None else _linear(padded, experts.gate, experts.gate_bias)
        neurons = act(gate, _linear(padded, experts.up, experts.up_bias))
        made = _linear(neurons, experts.down, experts.down_bias)
        made = made.reshape(count * longest, -1)[slot]
    return torch.zeros_like(hidden).index_add(0, tokens, made * share[:, None])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[K, n, in] and [K, out, in] -> [K, n, out]."""
    made = torch.bmm(x, weight.transpose(1, 2))
    return made if bias is None else made + bias[:, None]


def _one_by_one(experts: Expert, x: Tensor, hits: list[int], act: Activation) -> Tensor:
    """[n, H] of rows [n, H] that lie expert by expert, `hits` of each."""
    made = []
    for index, some in enumerate(torch.split(x, hits)):
        one = experts.map(itemgetter(index))
        made.append(output(one, activations(one, some, act)))
    return torch.cat(made)


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
