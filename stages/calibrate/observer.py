"""Watches every MoE block of a transformers model and adds up what its router and experts did.

It reads the model's own routing result and its own expert outputs; nothing is re-implemented, so
sigmoid, biased or group-limited routers are counted as they route. Padding never counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Sums = dict[str, np.ndarray[Any, Any]]
_Undo = Callable[[], None]

SCALARS = ("tokens", "selected", "gate", "gate_sq", "norm", "norm_sq", "gate_norm", "max_abs")
VECTORS = ("logit_gram", "co_selected", "gate_product")
INTEGERS = ("tokens", "selected", "co_selected")


@dataclass
class Routed:
    """One forward pass of one MoE block: T tokens, E experts, top-k."""

    logits: Tensor  # [T, E] raw router logits
    ids: Tensor  # [T, k] selected experts
    gates: Tensor  # [T, k] the weights that the model multiplied with
    outputs: Tensor  # [T, k, H] expert outputs before weighting
    inputs: Tensor  # [T, H] what router and experts see


def empty_sums(num_experts: int) -> Sums:
    """Zeros for one layer: `[E]` per scalar, `[E, E]` per vector column."""
    shapes = dict.fromkeys(SCALARS, (num_experts,)) | dict.fromkeys(
        VECTORS, (num_experts, num_experts)
    )
    kinds = {name: np.int64 if name in INTEGERS else np.float64 for name in shapes}
    return {name: np.zeros(shape, kinds[name]) for name, shape in shapes.items()}


def layer_sums(routed: Routed, num_experts: int) -> Sums:
    """Sufficient statistics of one batch, in int64 and float64 (shapes as `empty_sums`)."""
    ids, count = routed.ids.reshape(-1), routed.ids.shape[0]
    gates = routed.gates.double().reshape(-1)
    norms = torch.linalg.vector_norm(routed.outputs.double(), dim=-1).reshape(-1)
    largest = routed.outputs.abs().amax(dim=-1).double().reshape(-1)
    logits = routed.logits.double()
    # One-hot rows turn pair sums into two small matrix products: [T, E].
    chosen = _spread(routed.ids, torch.ones_like(routed.gates, dtype=torch.float64), num_experts)
    weighted = _spread(routed.ids, routed.gates.double(), num_experts)

    def per_expert(values: Tensor) -> Tensor:
        return torch.zeros(num_experts, dtype=torch.float64).index_add_(0, ids.cpu(), values.cpu())

    sums = {
        "tokens": torch.full((num_experts,), count, dtype=torch.int64),
        "selected": torch.bincount(ids, minlength=num_experts),
        "gate": per_expert(gates),
        "gate_sq": per_expert(gates.square()),
        "norm": per_expert(norms),
        "norm_sq": per_expert(norms.square()),
        "gate_norm": per_expert(gates * norms),
        "max_abs": torch.zeros(num_experts, dtype=torch.float64).scatter_reduce_(
            0, ids.cpu(), largest.cpu(), "amax"
        ),
        "logit_gram": logits.T @ logits,
        "co_selected": (chosen.T @ chosen).round().long(),
        "gate_product": weighted.T @ weighted,
    }
    return {name: tensor.numpy(force=True) for name, tensor in sums.items()}


def add(total: Sums, part: Sums) -> None:
    """Adds `part` into `total` in place; the only statistic that is not a sum is a maximum."""
    for name, values in part.items():
        if name == "max_abs":
            np.maximum(total[name], values, out=total[name])
        else:
            total[name] += values


class Observer:
    """Observes the MoE blocks of a model, one forward pass at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = moe_blocks(model)

    def observe(self, mask: Tensor) -> AbstractContextManager[dict[int, Routed]]:
        """Within the context one forward pass records layer -> `Routed` of unmasked tokens.

        Args:
            mask: `[B, S]` bool, False for padding.
        """
        return watching(self._blocks, mask)


@contextmanager
def watching(blocks: Mapping[int, nn.Module], mask: Tensor) -> Iterator[dict[int, Routed]]:
    """`Observer.observe` for some blocks by their layer: all of a model, or the one in memory."""
    seen: dict[int, Routed] = {}
    keep = mask.reshape(-1)
    undo = [_watch(block, layer, keep, seen) for layer, block in blocks.items()]
    try:
        yield seen
    finally:
        for each in undo:
            each()


def moe_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layer -> its MoE block."""
    layers = enumerate(model.get_submodule("model.layers").children())
    found = {index: moe_block(layer) for index, layer in layers}
    return {index: block for index, block in found.items() if block is not None}


def moe_block(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer that has both `gate` and `experts`; None in a dense layer."""
    blocks = [m for m in layer.modules() if hasattr(m, "gate") and hasattr(m, "experts")]
    return blocks[-1] if blocks else None


def _watch(block: nn.Module, layer: int, keep: Tensor, seen: dict[int, Routed]) -> _Undo:
    """Captures the router's logits and reroutes the experts through (token, expert) pairs.

    The family's own experts module runs once on the flattened pairs with unit weights, and the
    gates are applied afterwards: the same FLOPs, and every single expert output is seen.
    """
    router, experts = block.get_submodule("gate"), block.get_submodule("experts")
    own_forward = experts.forward
    logits: list[Tensor] = []

    def observed(hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        # hidden [T, H], ids and gates [T, k]
        pairs = own_forward(
            hidden.repeat_interleave(ids.shape[1], dim=0),
            ids.reshape(-1, 1),
            torch.ones_like(gates).reshape(-1, 1),
        )
        outputs = pairs.view(*ids.shape, -1)  # [T, k, H]
        seen[layer] = Routed(
            logits.pop()[keep], ids[keep], gates[keep], outputs[keep], hidden[keep]
        )
        combined: Tensor = (outputs * gates.unsqueeze(-1)).sum(dim=1)
        return combined.to(hidden.dtype)

    hook = router.register_forward_hook(lambda _module, _args, output: logits.append(output[0]))
    experts.forward = observed

    def undo() -> None:
        hook.remove()
        del experts.forward  # the class's own method shows again

    return undo


def _spread(ids: Tensor, values: Tensor, num_experts: int) -> Tensor:
    """[T, E] float64: `values[t, j]` at column `ids[t, j]`, zero elsewhere."""
    zeros = torch.zeros(ids.shape[0], num_experts, dtype=torch.float64, device=ids.device)
    return zeros.scatter_add_(1, ids, values)
