"""How large every chosen expert's own output is, read while the model itself runs its experts.

Three ways, by what the experts module offers; the first two leave the model's arithmetic to the
family's own code, and so does the third, which takes the weights out of it.

- `looked_at`: transformers' grouped implementation passes all outputs, before they are weighted,
  through an optional norm; an onlooker sits in its place.
- `top_one`: one expert per token and two-matrix modules: unit weights give the outputs.
- `in_pairs`: any other module, also one that sends tokens to other ranks: it is called once on
  (token, expert) pairs with unit weights, and the gates are applied afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
_CACHED_ELEMENTS = 1 << 17
_BITS = {2: torch.int16, 4: torch.int32}
Sizes = tuple[Tensor, Tensor]  # [...] Euclidean norms, [...] largest absolute components; float32


def sizes_of(rows: Tensor) -> Sizes:
    """`[N, H]` outputs -> `[N]` norms and `[N]` largest absolute components, in float32."""
    # Several passes over what is in the cache take half the time of as many over everything, and
    # memory that is used again costs no page faults.
    step = max(min(_CACHED_ELEMENTS // rows.shape[-1], len(rows)), 1)
    absolute = rows.new_empty((step, rows.shape[-1]))
    wide = None if rows.dtype == torch.float32 else absolute.float()
    norms = rows.new_empty(len(rows), dtype=torch.float32)
    # Positive floats are ordered as the integers that their bits spell; NaN is above all.
    kind = _BITS[rows.element_size()]
    largest, bits = rows.new_empty(len(rows), dtype=kind), absolute.view(kind)
    for start in range(0, len(rows), step):
        part, place = rows[start : start + step], slice(start, start + step)
        size = len(part)
        exact = part if wide is None else wide[:size].copy_(part)
        torch.linalg.vector_norm(exact, dim=-1, out=norms[place])
        torch.abs(part, out=absolute[:size])
        torch.amax(bits[:size], dim=-1, out=largest[place])
    return norms, largest.view(rows.dtype).float()


def run_observed(
    experts: Any, own: Forward, hidden: Tensor, ids: Tensor, gates: Tensor
) -> tuple[Tensor, Sizes]:
    """The module's result `[T, H]`, and the sizes `[T, k]` of the outputs that went into it.

    Args:
        experts: the family's module of routed experts; `own` is its forward.
        hidden: `[T, H]`. ids, gates: `[T, k]`, as the router gave them.
    """
    if _has_seat(experts):
        combined, found = looked_at(experts, own, hidden, ids, gates)
        if found is not None:
            return combined, found
    return in_pairs(own, hidden, ids, gates)


def looked_at(
    experts: Any, own: Forward, hidden: Tensor, ids: Tensor, gates: Tensor
) -> tuple[Tensor, Sizes | None]:
    """Runs the module as it is; None: this version of transformers works in another way."""
    seen: list[Sizes] = []

    def look(rows: Tensor) -> Tensor:  # [T * k, H], sorted by expert
        seen.append(sizes_of(rows))
        return rows

    orders: list[Tensor] = []
    experts.has_post_expert_norm, experts.post_expert_norm = True, look
    try:
        combined = own(hidden, _Traced.of(ids, orders), gates)
    finally:
        experts.has_post_expert_norm = False
        del experts.post_expert_norm
    if len(seen) != 1 or len(orders) != 1:
        return combined, None
    order = orders[0]
    norms, largest = (torch.empty_like(each).index_copy_(0, order, each) for each in seen[0])
    return combined, (norms.view(ids.shape), largest.view(ids.shape))


class _Traced(Tensor):
    """Expert ids that remember how they were sorted; sorting again may order equal keys otherwise.

    Only operations on the ids pass through here, and what follows from their order is plain again:
    a mode that sees every operation of the module takes a twentieth of a small model's time.
    """

    _orders: list[Tensor]

    @classmethod
    def of(cls, ids: Tensor, orders: list[Tensor]) -> _Traced:
        """`ids` whose every sorting adds its permutation to `orders`."""
        traced = ids.as_subclass(cls)
        traced._orders = orders
        return traced

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        ids = args[0]
        if function in _SORTS:
            ids._orders.append(found.indices)
        elif function in _RESHAPES and type(ids) is cls:
            return cls.of(found, ids._orders)
        return found


_SORTS = (torch.sort, Tensor.sort)
_RESHAPES = (Tensor.reshape, Tensor.view, Tensor.flatten)


def in_pairs(own: Forward, hidden: Tensor, ids: Tensor, gates: Tensor) -> tuple[Tensor, Sizes]:
    """One call on `[T * k]` pairs with unit weights: the same FLOPs, and every output is seen."""
    pairs = own(
        hidden.repeat_interleave(ids.shape[1], dim=0),
        ids.reshape(-1, 1),
        torch.ones_like(gates).reshape(-1, 1),
    )
    norms, largest = sizes_of(pairs)
    outputs = pairs.view(*ids.shape, -1)  # [T, k, H]
    combined: Tensor = (outputs * gates.unsqueeze(-1)).sum(dim=1)
    return combined.to(hidden.dtype), (norms.view(ids.shape), largest.view(ids.shape))


def top_one(own: Forward, hidden: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, Sizes]:
    """As `run_observed` for a top-1 router: `mask` `[T, 1, E]` of ones, `weights` `[T, 1]`.

    Tokens that were dropped have an output of zero.
    """
    outputs = own(hidden, mask, torch.ones_like(weights))
    norms, largest = sizes_of(outputs)
    return outputs * weights, (norms.unsqueeze(1), largest.unsqueeze(1))


def one_by_one(experts: Any, hidden: Tensor, ids: Tensor, processed: Tensor) -> Sizes:
    """Sizes `[T, k]` of the outputs of a dictionary of experts for the pairs in `processed`."""
    norms = torch.zeros(ids.shape, device=hidden.device)
    largest = torch.zeros_like(norms)
    for index, expert in enumerate(experts.values()):
        pairs = ((ids == index) & processed).nonzero(as_tuple=True)
        if len(pairs[0]):
            norms[pairs], largest[pairs] = sizes_of(expert(hidden[pairs[0]]))
    return norms, largest


def _has_seat(experts: Any) -> bool:
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    free = getattr(experts, "has_post_expert_norm", None) is False
    return free and implementation == "grouped_mm"
