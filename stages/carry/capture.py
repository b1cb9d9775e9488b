"""What the experts of a layer are given and give at sampled tokens, and what becomes of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blocks import MoeBlock
from models.errors import CheckpointError
from models.streaming.model import LayerCall, hidden_of

# Rounding of float32 through a layer's last additions, with room; a norm is off by far more.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Seen:
    """One pass through one MoE block, at n sampled tokens."""

    hidden: Tensor  # [n, H] what router and experts saw
    ids: Tensor  # [n, k] int64
    gates: Tensor  # [n, k] float32
    made: Tensor  # [n, H] the experts' weighted sum


@contextmanager
def capturing(found: MoeBlock, rows: Tensor, *, everywhere: bool) -> Iterator[list[Seen]]:
    """Within the context a forward pass appends what it did at `rows` of its B * S tokens.

    Args:
        everywhere: whether the experts run on all tokens, or on `rows` alone: what comes out of the
            layer is then right at `rows` alone, and the pass costs little more than its attention.
    """
    own, seen = found.experts.forward, list[Seen]()

    def forward(hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        made: Tensor
        if everywhere:
            made = own(hidden, ids, gates)
        else:
            made = torch.zeros_like(hidden)
            made[rows] = own(hidden[rows], ids[rows], gates[rows])
        picked = (each[rows].cpu() for each in (hidden, ids, gates, made))
        some, chosen, weights, output = picked
        seen.append(Seen(some.float(), chosen.long(), weights.float(), output.float()))
        return made

    with _forward(found.experts, forward):
        yield seen


@torch.inference_mode()
def factor(layer: nn.Module, found: MoeBlock, call: LayerCall, name: str) -> float:
    """c in layer(x) = rest(x) + c experts(x), found by putting random numbers in their place.

    Args:
        call: how the model calls the layer, with hidden states [B, S, H].
        name: of the family, for the message.

    Raises:
        CheckpointError: the layer does something else with what its experts add up to.
    """
    generator = torch.Generator().manual_seed(0)
    base = _with_output(layer, found, call, torch.zeros_like)
    size = float(base.square().mean().sqrt())

    def random(hidden: Tensor) -> Tensor:
        return (torch.randn(hidden.shape, generator=generator) * size).to(hidden)

    moved = _with_output(layer, found, call, random) - base
    put = torch.randn(base.shape, generator=generator.manual_seed(0)) * size
    moved, put = moved.double().cpu().reshape(put.shape), put.double()
    found_factor = float((moved * put).sum() / put.square().sum())
    off = float((moved - found_factor * put).norm() / put.norm())
    # Written so that NaN is refused.
    if not (off <= _TOLERANCE * abs(found_factor)):
        raise CheckpointError(
            f"{name} does more than to scale what its experts add up to: with random numbers in"
            f" their place the residual stream moves by {found_factor:.3g} times those, and a rest"
            f" of {off:.3g} of their size",
            "set refit.target=original; calibrate.statistics=RUN/statistics.arrow reuses what was"
            " observed",
        )
    return found_factor


def _with_output(
    layer: nn.Module, found: MoeBlock, call: LayerCall, make: Callable[[Tensor], Tensor]
) -> Tensor:
    """The hidden states behind the layer with `make(hidden)` for what the experts put out."""
    with _forward(found.experts, lambda hidden, _ids, _gates: make(hidden)):
        return hidden_of(call.run(layer, call.hidden))


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own method shows again
