"""Watches every MoE block of a transformers model and adds up what its router and experts did.

It reads the model's own routing result and its own expert outputs; nothing is re-implemented, so
sigmoid, biased or group-limited routers are counted as they route. Padding never counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from models.blocks import MoeBlock, find_blocks
from stages.calibrate.choices import Choice, has_capacity, limited
from stages.calibrate.outputs import Sizes, one_by_one, run_observed, top_one

Array = np.ndarray[Any, Any]
Sums = dict[str, Array]
_Undo = Callable[[], None]

SCALARS = (
    "tokens",
    "selected",
    "processed",
    "gate",
    "gate_sq",
    "norm",
    "norm_sq",
    "gate_norm",
    "max_abs",
)
VECTORS = ("logit_gram", "co_selected", "gate_product")
INTEGERS = ("tokens", "selected", "processed", "co_selected")


@dataclass(frozen=True)
class Routed:
    """One forward pass of one MoE block: T tokens that are no padding, E experts, top-k."""

    logits: Tensor  # [T, E] raw router logits
    ids: Tensor  # [T, k] experts that the router chose
    gates: Tensor  # [T, k] the weights that the model multiplied with; 0 where it dropped
    norms: Tensor  # [T, k] float32: Euclidean norms of the experts' outputs before weighting
    largest: Tensor  # [T, k] float32: their largest absolute components
    processed: Tensor | None = None  # [T, k] bool: the expert had room; None: all
    hidden: Tensor | None = field(default=None, repr=False)  # [B * S, H], with padding
    keep: Tensor | None = field(default=None, repr=False)  # [B * S] bool; None: all

    @property
    def inputs(self) -> Tensor:
        """[T, H]: the hidden states that entered router and experts; picked out when asked for."""
        assert self.hidden is not None
        return self.hidden if self.keep is None else self.hidden[self.keep]


HandOver = Callable[[int, Routed], None]


def empty_sums(num_experts: int) -> Sums:
    """Zeros for one layer: `[E]` per scalar, `[E, E]` per vector column."""
    shapes = dict.fromkeys(SCALARS, (num_experts,)) | dict.fromkeys(
        VECTORS, (num_experts, num_experts)
    )
    kinds = {name: np.int64 if name in INTEGERS else np.float64 for name in shapes}
    return {name: np.zeros(shape, kinds[name]) for name, shape in shapes.items()}


def layer_sums(routed: Routed, num_experts: int) -> Sums:
    """Sufficient statistics of one batch, in int64 and float64 (shapes as `empty_sums`).

    Sums over (token, expert) pairs are made on the CPU, one after the other: on a GPU their order,
    and with it the last bit, would be left to chance.
    """
    experts = routed.ids.numpy(force=True)
    ids = experts.reshape(-1)
    gates, norms, largest = (
        each.double().numpy(force=True).reshape(-1)
        for each in (routed.gates, routed.norms, routed.largest)
    )
    logits = routed.logits.double()

    def per_expert(weights: Array | None = None) -> Array:
        return np.bincount(ids, weights, minlength=num_experts)

    selected, gate_sq = per_expert(), per_expert(gates * gates)
    maximum = np.zeros(num_experts)
    np.maximum.at(maximum, ids, largest)
    together, product = _mirrored(experts, gates.reshape(experts.shape), num_experts)
    return {
        "tokens": np.full(num_experts, len(experts), np.int64),
        "selected": selected,
        "processed": selected if routed.processed is None else _processed(routed, num_experts),
        "gate": per_expert(gates),
        "gate_sq": gate_sq,
        "norm": per_expert(norms),
        "norm_sq": per_expert(norms * norms),
        "gate_norm": per_expert(gates * norms),
        "max_abs": maximum,
        "logit_gram": (logits.T @ logits).numpy(force=True),
        "co_selected": together + np.diag(selected),
        "gate_product": product + np.diag(gate_sq),
    }


def add(total: Sums, part: Sums) -> None:
    """Adds `part` into `total` in place; the only statistic that is not a sum is a maximum."""
    for name, values in part.items():
        if name == "max_abs":
            np.maximum(total[name], values, out=total[name])
        else:
            total[name] += values


class Observer:
    """Observes the MoE blocks of a model, one forward pass at a time."""

    def __init__(self, model: Any) -> None:
        self._blocks = find_blocks(model)

    def observe(
        self, mask: Tensor, hand_over: HandOver | None = None
    ) -> AbstractContextManager[dict[int, Routed]]:
        """`watching` for all blocks of the model."""
        return watching(self._blocks, mask, hand_over)


@contextmanager
def watching(
    blocks: Mapping[int, MoeBlock], mask: Tensor, hand_over: HandOver | None = None
) -> Iterator[dict[int, Routed]]:
    """Within the context one forward pass records layer -> `Routed` of unmasked tokens.

    Args:
        blocks: those of a model, or of the one layer in memory.
        mask: `[B, S]` bool, False for padding.
        hand_over: is given each layer as soon as it has run; nothing is then kept, so that memory
            does not grow with depth.
    """
    seen: dict[int, Routed] = {}
    keep = None if bool(mask.all()) else mask.reshape(-1)
    undo = [_watch(b, layer, keep, hand_over or seen.__setitem__) for layer, b in blocks.items()]
    try:
        yield seen
    finally:
        for each in undo:
            each()


def _watch(found: MoeBlock, layer: int, keep: Tensor | None, hand_over: HandOver) -> _Undo:
    """Stands between router and experts: sees what the one says and what the others do."""
    router, experts = found.router, found.experts
    own = experts.forward
    heard: list[Any] = []

    def observed(hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        # hidden [T, H]; ids and gates in the form that the family's router gives them
        said = heard.pop()
        if not has_capacity(said):
            combined, sizes = run_observed(experts, own, hidden, ids, gates)
            choice = Choice(said[0].flatten(0, -2), ids, gates, None)
        else:
            choice = limited(router, said)
            assert choice.processed is not None
            if choice.ids.shape[1] == 1:
                combined, sizes = top_one(own, hidden, ids, gates)
            else:
                combined = own(hidden, ids, gates)
                sizes = one_by_one(experts, hidden, choice.ids, choice.processed)
        hand_over(layer, _routed(choice, sizes, hidden, keep))
        return combined

    hook = router.register_forward_hook(lambda _module, _args, output: heard.append(output))
    experts.forward = observed

    def undo() -> None:
        hook.remove()
        del experts.forward  # the class's own method shows again

    return undo


def _routed(choice: Choice, sizes: Sizes, hidden: Tensor, keep: Tensor | None) -> Routed:
    def kept(values: Tensor) -> Tensor:
        return values if keep is None else values[keep]

    return Routed(
        logits=kept(choice.logits),
        ids=kept(choice.ids),
        gates=kept(choice.gates),
        norms=kept(sizes[0]),
        largest=kept(sizes[1]),
        processed=None if choice.processed is None else kept(choice.processed),
        hidden=hidden,
        keep=keep,
    )


def _processed(routed: Routed, num_experts: int) -> Array:
    assert routed.processed is not None
    return np.bincount(routed.ids[routed.processed].numpy(force=True), minlength=num_experts)


def _mirrored(ids: Array, gates: Array, num_experts: int) -> tuple[Array, Array]:
    """`[E, E]` counts and gate products over ordered pairs of different ranks among a token's k.

    Args:
        ids: `[T, k]`. gates: `[T, k]` float64.
    """
    size, shape = num_experts * num_experts, (num_experts, num_experts)
    together, product = np.zeros(size, np.int64), np.zeros(size)
    # Rank by rank, each pair once and then mirrored: [T, k, k] arrays take four times as long.
    ranks, weights = np.ascontiguousarray(ids.T), np.ascontiguousarray(gates.T)
    for i, first in enumerate(ranks):
        for j in range(i):
            pairs = first * num_experts + ranks[j]
            together += np.bincount(pairs, minlength=size)
            product += np.bincount(pairs, weights[i] * weights[j], minlength=size)
    together, product = together.reshape(shape), product.reshape(shape)
    return together + together.T, product + product.T
