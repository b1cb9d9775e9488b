"""A reduced layer fitted to the original one, on the sample of what enters it.

Needs the layer's original experts, the reduced ones, and the sample: nothing of any other layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.expert import Expert
from models.expert_function import Activation, activation, activations, output
from models.moe import MoeCheckpoint
from stages.inputs.read import LayerInputs
from stages.narrow.config import NarrowConfig
from stages.narrow.surgeon import narrow
from stages.refit.config import PolishConfig, RefitConfig
from stages.refit.goal import Distributions, Goal, Outputs, average
from stages.refit.polish import layer_output, polish
from stages.refit.problem import Problem
from stages.refit.ridge import gram
from stages.refit.solve import refit
from stages.refit.usage import Usage, usage

# Tokens that stand for the whole layer where an expert has too few of its own.
_BACKGROUND_TOKENS = 2048


@dataclass
class Reduction:
    """What becomes of a layer's experts, and how well; errors are shares of the output energy."""

    experts: list[Expert]
    facts: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def target_of(moe: MoeCheckpoint, inputs: LayerInputs) -> Tensor:
    """[N, H] fp64: what the original routed experts add up to, one expert in memory at a time."""
    act, x = activation(moe.checkpoint.config), inputs.hidden.float()
    total = torch.zeros(x.shape, dtype=torch.float64)
    for index, each in enumerate(usage(inputs.ids, inputs.gates, moe.num_experts)):
        expert = moe.read_expert(inputs.layer, index).map(Tensor.float)
        made = output(expert, activations(expert, x[each.tokens], act))
        total.index_add_(0, each.tokens, made.double() * each.gates[:, None])
    return total


@torch.inference_mode()
def reduce_experts(
    moe: MoeCheckpoint,
    experts: Sequence[Expert],
    width: int | None,
    inputs: LayerInputs,
    routing: tuple[Tensor, Tensor],
    narrow_config: NarrowConfig,
    refit_config: RefitConfig,
    target: Tensor | None = None,
    final: Distributions | None = None,
) -> Reduction:
    """Narrows `experts` to `width` neurons, then refits their down projections together.

    Args:
        experts: those that are kept, as merged, in their stored type.
        routing: ids [N, k] among `experts` (negative: gone) and gates [N, k] on the sample.
        target: [N, H] what the experts are to add up to; None: what the original ones do.
        final: what gradient steps lead to in place of `target`, in the model's last layer.
    """
    act, x = activation(moe.checkpoint.config), inputs.hidden.float()
    use = usage(*routing, len(experts))
    wide = [expert.map(Tensor.float) for expert in experts]
    rows = [expert.down.T.double() for expert in wide]
    found = Reduction(wide)
    # What judges the refit must not have shaped what it is compared with.
    judges = held_out(inputs, refit_config.held_out)
    shaping = [each.among(~judges) for each in use] if refit_config.enabled else use
    if width is not None and width < wide[0].neurons:
        rows = _narrow_all(found, rows, width, x, shaping, act, narrow_config)
    if not refit_config.enabled:
        target = None
    else:
        target = target_of(moe, inputs) if target is None else target.double()
    if target is not None:
        own = target - _biases(wide, use, x)
        rows = _refit_all(found, rows, own, x, judges, routing, act, refit_config)
    found.experts = [
        replace(each, down=row.T.float().contiguous())
        for each, row in zip(found.experts, rows, strict=True)
    ]
    if target is not None and refit_config.polish.steps:
        outputs = Outputs(target.float())
        _polish_all(found, outputs, final, x, judges, routing, act, refit_config.polish)
    kind = experts[0].down.dtype
    found.experts = [each.map(lambda tensor: tensor.to(kind)) for each in found.experts]
    return found


def held_out(inputs: LayerInputs, share: float) -> Tensor:
    """[N] bool: whole blocks of text, evenly spread; single tokens if there is one block only."""
    blocks, rank = torch.unique(inputs.block, return_inverse=True)
    if len(blocks) == 1:
        rank = torch.arange(len(inputs))
    chosen: Tensor = rank % max(round(1 / share), 2) == 0
    return chosen


def _narrow_all(
    found: Reduction,
    rows: list[Tensor],
    width: int,
    x: Tensor,
    use: Sequence[Usage],
    act: Activation,
    config: NarrowConfig,
) -> list[Tensor]:
    """The rows of every narrowed expert, [I', H] fp64; `found.experts` lose the others' neurons."""
    solved, error, energy, borrowed = [], 0.0, 0.0, []
    for index, (expert, each) in enumerate(zip(found.experts, use, strict=True)):
        features = activations(expert, x[each.tokens], act).double() * each.gates[:, None]
        products = gram(features)
        missing = config.tokens_per_neuron * width - len(each.tokens)
        if missing > 0:
            products = products + missing * _background(expert, x, use, act)
            borrowed.append(index)
        narrowed = narrow(products, rows[index], width, config.ridge)
        found.experts[index] = expert.select(narrowed.kept)
        solved.append(narrowed.rows)
        error, energy = error + narrowed.error, energy + narrowed.energy
    found.facts |= {"narrow_error": error / max(energy, 1e-300), "few_tokens": borrowed}
    return solved


def _background(expert: Expert, x: Tensor, use: Sequence[Usage], act: Activation) -> Tensor:
    """[I, I] the Gram matrix that one token of this layer adds on average, were it routed here."""
    step = -(-len(x) // _BACKGROUND_TOKENS)
    hidden = activations(expert, x[::step], act)
    gates = torch.cat([each.gates for each in use])
    return gram(hidden) * (gates.square().mean() / len(hidden))


def _refit_all(
    found: Reduction,
    rows: list[Tensor],
    target: Tensor,
    x: Tensor,
    judges: Tensor,
    routing: tuple[Tensor, Tensor],
    act: Activation,
    config: RefitConfig,
) -> list[Tensor]:
    """The refitted rows, [I', H] fp64 per expert."""
    experts = found.experts
    some = _spread(len(x), config.solved_on, len(experts) * experts[0].neurons)
    problem = Problem(
        inputs=x[some],
        target=target[some],
        use=usage(routing[0][some], routing[1][some], len(experts)),
        activations=lambda index, some: activations(experts[index], some, act),
        neurons=experts[0].neurons,
    )
    fit = refit(
        problem,
        torch.cat(rows),
        list(config.strengths),
        judges[some],
        config.joint_limit,
    )
    found.facts |= {
        name: getattr(fit, name)
        for name in (
            "strength",
            "error_before",
            "error_after",
            "held_out_before",
            "held_out_after",
            "condition",
            "tokens_per_unknown",
        )
    }
    return [fit.weights[problem.rows(index)] for index in range(len(experts))]


def _spread(tokens: int, per_unknown: float | None, unknowns: int) -> slice:
    """Evenly spread tokens, no more than `per_unknown` for each unknown row; None: all."""
    if per_unknown is None:
        return slice(None)
    return slice(None, None, max(1, math.ceil(tokens / (per_unknown * unknowns))))


def _polish_all(
    found: Reduction,
    outputs: Outputs,
    final: Distributions | None,
    x: Tensor,
    judges: Tensor,
    routing: tuple[Tensor, Tensor],
    act: Activation,
    config: PolishConfig,
) -> None:
    """Gradient steps on the tokens that do not judge; undone where those that do gain nothing."""
    (ids, gates), fit = routing, ~judges
    goal: Goal = outputs if final is None else final

    def off(goal: Goal, experts: Sequence[Expert]) -> float:
        made = layer_output(experts, x[judges], ids[judges], gates[judges].float(), act)
        return average(goal.among(judges), made)

    before = off(goal, found.experts)
    with torch.inference_mode(False), torch.enable_grad():
        # What was made in inference mode takes part in no gradient; copies do.
        inputs, chosen, shares = (each[fit].clone() for each in (x, ids, gates.float()))
        start = [each.map(Tensor.clone) for each in found.experts]
        tuned = polish(start, inputs, (chosen, shares), goal.among(fit), act, config)
    after = off(goal, tuned)
    found.facts["polished"] = after < before
    if final is not None:
        found.facts |= {"held_out_kl_before": before, "held_out_kl_after": min(after, before)}
    if after < before:
        found.experts = tuned
        found.facts["held_out_after"] = off(outputs, tuned)


def _biases(experts: Sequence[Expert], use: Sequence[Usage], x: Tensor) -> Tensor | float:
    """[N, H] what the kept experts' output biases add; they are not refitted."""
    if experts[0].down_bias is None:
        return 0.0
    total = torch.zeros(x.shape, dtype=torch.float64)
    for expert, each in zip(experts, use, strict=True):
        assert expert.down_bias is not None
        total.index_add_(0, each.tokens, each.gates[:, None] * expert.down_bias.double())
    return total
