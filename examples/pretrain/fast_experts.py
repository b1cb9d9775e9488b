"""A mixture-of-experts forward for training on a CPU: one batched matmul for all experts.

The reference loop of transformers gathers, multiplies and scatter-adds per expert. Here tokens are
copied once into a buffer [experts, capacity, hidden], whose capacity is a multiple of 64 so that
matrix units stay busy, and both projections are a single `bmm`. No token is ever dropped: capacity
follows the fullest expert of the batch. Because every slot is filled from one token, both
directions of both copies are plain gathers; autograd would use slow scatter-adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

IMPLEMENTATION = "padded_bmm"
CAPACITY_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Where each of the T*K (token, choice) pairs sits in the buffer of E*C slots."""

    slot_of_pair: Tensor  # [T*K] slot index
    pair_of_slot: Tensor  # [E*C] pair index, arbitrary for empty slots
    occupied: Tensor  # [E*C, 1] 1 for a filled slot, 0 for padding
    capacity: int
    top_k: int


def plan_dispatch(top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> Dispatch:
    """Assign each pair of `top_k_index` [T, K] a slot, in order of expert and then token."""
    experts = top_k_index.reshape(-1)  # [T*K]
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=num_experts)  # [E]
    capacity = CAPACITY_MULTIPLE * -(-int(counts.max()) // CAPACITY_MULTIPLE)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.arange(experts.numel()) - first[experts[order]]
    slot = experts[order] * capacity + rank
    pair_of_slot = torch.zeros(num_experts * capacity, dtype=torch.long).index_copy_(0, slot, order)
    occupied = torch.zeros(num_experts * capacity, dtype=dtype).index_fill_(0, slot, 1.0)
    slot_of_pair = torch.empty_like(slot).index_copy_(0, order, slot)
    return Dispatch(slot_of_pair, pair_of_slot, occupied[:, None], capacity, top_k_index.shape[1])


class Scatter(torch.autograd.Function):
    """Copy tokens [T, H] to slots [E*C, H]; rows of empty slots are never read afterwards."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, plan: Dispatch) -> Tensor:
        """Gather by the token of each slot."""
        ctx.plan = plan
        return tokens.index_select(0, plan.pair_of_slot // plan.top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Sum over the K slots of each token."""
        per_pair = grads[0].index_select(0, ctx.plan.slot_of_pair)  # [T*K, H]
        return per_pair.view(-1, ctx.plan.top_k, per_pair.shape[-1]).sum(1), None


class Combine(torch.autograd.Function):
    """Weighted sum of the K slots of each token: [E*C, H], weights [T, K] -> [T, H]."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, weights: Tensor, plan: Dispatch) -> Tensor:
        """Gather by the slots of each token."""
        chosen = slots.index_select(0, plan.slot_of_pair).view(*weights.shape, -1)  # [T, K, H]
        ctx.plan = plan
        ctx.save_for_backward(chosen, weights)
        return (chosen * weights.to(chosen.dtype)[..., None]).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Send the gradient to each slot; an empty slot gets zero."""
        chosen, weights = ctx.saved_tensors
        plan, grad = ctx.plan, grads[0]
        scale = weights.reshape(-1, 1).to(grad.dtype).index_select(0, plan.pair_of_slot)
        to_slots = grad.index_select(0, plan.pair_of_slot // plan.top_k) * (scale * plan.occupied)
        to_weights = torch.matmul(chosen, grad[..., None]).squeeze(-1)  # [T, K]
        return to_slots, to_weights.to(weights.dtype), None


def padded_bmm_forward(
    experts: MixtralExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Drop-in for `MixtralExperts.forward`: hidden [T, H], index and weights [T, K] -> [T, H]."""
    # While training these are cast copies of the parameters: [E, 2F, H] and [E, H, F].
    gate_up: Tensor = experts.gate_up_proj
    down: Tensor = experts.down_proj
    plan = plan_dispatch(top_k_index, gate_up.shape[0], hidden.dtype)
    # torch does not type `Function.apply`, here and below.
    slots: Tensor = Scatter.apply(hidden, plan)  # type: ignore[no-untyped-call]
    slots = slots.view(gate_up.shape[0], plan.capacity, -1)  # [E, C, H]
    gate, up = torch.bmm(slots, gate_up.transpose(1, 2)).chunk(2, dim=-1)  # [E, C, F] each
    slots = torch.bmm(nn.functional.silu(gate) * up, down.transpose(1, 2))  # [E, C, H]
    out: Tensor = Combine.apply(slots.flatten(0, 1), top_k_weights, plan)  # type: ignore[no-untyped-call]
    return out


def register() -> None:
    """Make the forward selectable as `experts_implementation=IMPLEMENTATION`."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, padded_bmm_forward)
