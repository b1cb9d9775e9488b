"""What a router chose, as it says itself.

Decoders' routers return `(logits [T, E], weights [T, k], ids [T, k])`. Those of the families with
expert capacity return `(mask [.., E], weights [.., 1 or E], logits [.., E])`: in the mask a token
that came too late for its expert looks like one that chose nothing, so the choice is read from the
probabilities and the mask only tells whether it was honoured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import StatisticsError


@dataclass(frozen=True)
class Choice:
    """The choices of T tokens among E experts."""

    logits: Tensor  # [T, E] raw
    ids: Tensor  # [T, k] int64
    gates: Tensor  # [T, k] weights; zero where an expert was full
    processed: Tensor | None  # [T, k] bool: not dropped. None: nothing is ever dropped


def has_capacity(said: Any) -> bool:
    """Whether a router's output is that of a family with expert capacity.

    Raises:
        StatisticsError: neither of the two known forms.
    """
    if isinstance(said, tuple) and len(said) == 3:
        if not said[2].is_floating_point():
            return False
        if not said[0].is_floating_point():
            return True
    raise StatisticsError(
        f"a router returned {_form(said)}, which is neither (logits, weights, ids) nor"
        " (mask, weights, logits)",
        "use a model whose router transformers gives one of these forms",
    )


def limited(router: nn.Module, said: tuple[Tensor, Tensor, Tensor]) -> Choice:
    """The choice of a router with capacity: top-1 or top-2, before any token is dropped.

    Raises:
        StatisticsError: the router draws its second expert at random.
    """
    mask, weights, logits = (each.flatten(0, -2) for each in said)
    if getattr(router, "second_expert_policy", "all") != "all":
        raise StatisticsError(
            f"the router draws at random (second_expert_policy={router.second_expert_policy})",
            "set second_expert_policy to all in config.json",
        )
    # As the router compares them: rounded to the model's type, where the first of equals wins.
    kind: Any = router
    scores = logits.softmax(dim=-1, dtype=kind.dtype).to(kind.input_dtype)
    first = scores.argmax(dim=-1, keepdim=True)
    if weights.shape[-1] == 1:
        processed = mask.gather(1, first) > 0
        return Choice(logits, first, weights * processed, processed)
    second = logits.scatter(1, first, float("-inf")).argmax(dim=-1, keepdim=True)
    ids = torch.cat([first, second], dim=1)
    gates = weights.gather(1, ids)
    return Choice(logits, ids, gates, gates > 0)


def _form(said: Any) -> str:
    if isinstance(said, tuple):
        return f"({', '.join(_form(each) for each in said)})"
    return f"{list(said.shape)} {said.dtype}" if isinstance(said, Tensor) else type(said).__name__
