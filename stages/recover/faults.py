"""Which layer or value made a loss or gradient that is no number; asked once one was met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import TrainingError


def refuse_non_finite(
    step: int,
    what: str,
    trained: Mapping[str, nn.Parameter],
    model: Any,
    forward: Callable[[], Any],
) -> None:
    """Says what was not finite and where it began; training is over.

    Args:
        what: `loss` or `gradient`.
        forward: one pass of the step again.

    Raises:
        TrainingError: always.
    """
    raise TrainingError(
        f"the {what} of step {step + 1} is not finite; {_cause(trained, model, forward)}",
        "lower recover.learning_rate, or raise recover.warmup; the newest checkpoint of the"
        " training holds finite values, and a start with other settings needs a new run_dir",
    )


def _cause(trained: Mapping[str, nn.Parameter], model: Any, forward: Callable[[], Any]) -> str:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            kind = "trained" if name in trained else "frozen"
            return f"first the {kind} value {name}"
    if (module := _first_output(model, forward)) is not None:
        return f"first the output of {module}"
    for name, parameter in trained.items():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"first the gradient of {name}"
    return "every value and output of the model is finite, so it lies in the loss itself"


@torch.no_grad()
def _first_output(model: Any, forward: Callable[[], Any]) -> str | None:
    """The innermost module whose output was the first that is not finite."""
    found: list[str] = []

    def look(name: str, _: nn.Module, __: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
        if not found and not all(bool(t.isfinite().all()) for t in floats):
            found.append(name)

    from functools import partial

    hooks = [
        module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
