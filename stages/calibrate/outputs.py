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
from torch.overrides import TorchFunctionMode

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
_CACHED_ELEMENTS = 1 << 17
_BITS = {2: (torch.int16, (1 << 15) - 1), 4: (torch.int32, (1 << 31) - 1)}
Sizes = tuple[Tensor, Tensor]  # [...] Euclidean norms, [...] largest absolute components; float32


def sizes_of(rows: Tensor) -> Sizes:
    """`[N, H]` outputs -> `[N]` norms and `[N]` largest absolute components, in float32."""
    # Several passes over what is in the cache take half the time of as many over everything.
    step = max(_CACHED_ELEMENTS // rows.shape[-1], 1)
    parts = [
        (torch.linalg.vector_norm(part.float(), dim=-1), _largest(part))
        for part in torch.split(rows, step)
    ]
    norms, largest = zip(*parts, strict=True)
    return torch.cat(norms), torch.cat(largest)


def _largest(rows: Tensor) -> Tensor:
    """Absolute floats are ordered as the integers that their bits spell; NaN is above all."""
    kind, without_sign = _BITS[rows.element_size()]
    largest = (rows.view(kind) & without_sign).amax(dim=-1)
    return largest.view(rows.dtype).float()


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

    experts.has_post_expert_norm, experts.post_expert_norm = True, look
    try:
        with _Sorting() as sorting:
            combined = own(hidden, ids, gates)
    finally:
        experts.has_post_expert_norm = False
        del experts.post_expert_norm
    if len(seen) != 1 or sorting.order is None:
        return combined, None
    order = sorting.order
    norms, largest = (torch.empty_like(each).index_copy_(0, order, each) for each in seen[0])
    return combined, (norms.view(ids.shape), largest.view(ids.shape))


class _Sorting(TorchFunctionMode):
    """Remembers how the module sorted its pairs; sorting again may order equal keys otherwise."""

    order: Tensor | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch.sort:
            self.order = found.indices
        return found


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
