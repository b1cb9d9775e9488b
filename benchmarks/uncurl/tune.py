"""Training after a reduction, as the paper has it: the routers alone, then everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.uncurl.setup import Tuning
from stages.recover.loss import recovery_loss

BATCH = 16


@torch.inference_mode()
def mean_loss(model: Any, rows: Tensor) -> float:
    """Mean cross-entropy in nats per token of windows [W, S + 1]."""
    total = 0.0
    for batch in rows.split(BATCH):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        targets = batch[:, 1:].flatten()
        total += float(
            nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
        )
    return total / rows[:, 1:].numel()


def routers(model: nn.Module) -> list[nn.Parameter]:
    """Weights of all routers."""
    return [weight for name, weight in model.named_parameters() if name.endswith("gate.weight")]


def stage(
    model: Any,
    weights: Sequence[nn.Parameter],
    rows: Tensor,
    steps: Sequence[int],
    tuning: Tuning,
    rate: float,
    last: int,
) -> float:
    """AdamW on `weights` alone, its rate falling to zero at step `last`; returns the last loss.

    Args:
        rows: [W, S + 1] training windows.
        steps: numbers of the steps to be made; a step's batch depends on its number alone.
    """
    for weight in model.parameters():
        weight.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    loss = torch.zeros(())
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (last - number) / last
        batch = rows[batch_at(len(rows), tuning.batch, step)]
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        loss, _ = recovery_loss(logits, batch[:, 1:].flatten(), None, alpha=0.0, temperature=1.0)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return float(loss.detach())


def batch_at(count: int, size: int, step: int) -> Tensor:
    """[size] indices of the windows of a step."""
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(step))


def two_stages(
    model: Any, rows: Tensor, tuning: Tuning, measure: Callable[[], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Losses before, after the routers' stage, and after all, as `measure` gives them."""
    found = {"before": measure()}
    first, second = tuning.router_steps, tuning.full_steps
    stage(model, routers(model), rows, range(first), tuning, tuning.router_rate, first)
    found["routers"] = measure()
    later = range(first, first + second)
    stage(model, list(model.parameters()), rows, later, tuning, tuning.full_rate, second)
    return found | {"tuned": measure()}


def routers_alone(
    model: Any,
    rows: Tensor,
    tuning: Tuning,
    marks: Sequence[int],
    measure: Callable[[], dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Losses after each number of steps in `marks`, ascending, at a constant rate."""
    found, done = {}, 0
    for mark in marks:
        steps = range(done, mark)
        if steps:
            # The optimiser starts anew at a mark; it forgets its means, which 20 steps rebuild.
            stage(model, routers(model), rows, steps, tuning, tuning.router_rate, 10**9)
        found[str(mark)] = measure()
        done = mark
    return found
