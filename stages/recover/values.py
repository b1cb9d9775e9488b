"""Which parameters of a student are trained, and which experts never got a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.blocks import find_blocks
from models.errors import CheckpointError
from stages.recover.config import RecoverConfig


def trained_parameters(model: Any, config: RecoverConfig) -> dict[str, nn.Parameter]:
    """Name in memory -> parameter, in the model's order; all others are frozen, in place.

    Tied parameters count once, under their first name.

    Raises:
        CheckpointError: nothing is left to train.
    """
    chosen = {id(p) for module in _modules(model, config) for p in module.parameters()}
    found = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        if id(parameter) in chosen:
            found[name] = parameter
    if not found:
        raise CheckpointError(
            f"{type(model).__name__} has nothing to train with recover.mode={config.mode}",
            "choose another recover.mode",
        )
    return found


def untrained_experts(model: Any, second: Mapping[str, Tensor]) -> dict[int, list[int]]:
    """Layer -> its experts of which no value has ever had a gradient.

    Args:
        second: by name, Adam's second moments or where along their first axis they are not zero
            (`moved`): zero where no gradient ever was. A value that is not there was not trained.
    """
    found: dict[int, list[int]] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for layer, block in find_blocks(model).items():
        start = f"{names[id(block.experts)]}."
        moments = {n.removeprefix(start): m for n, m in second.items() if n.startswith(start)}
        silent = [e for e, parts in _by_expert(block.experts, moments).items() if not any(parts)]
        if silent:
            found[layer] = silent
    return found


def moved(moment: Tensor) -> Tensor:
    """[n] bool of `[n, ...]`: where anything is not zero."""
    return moment.reshape(len(moment), -1).any(dim=1)


def _modules(model: Any, config: RecoverConfig) -> list[nn.Module]:
    if config.mode == "full":
        return [model]
    blocks = find_blocks(model).values()
    routers = [block.router for block in blocks]
    experts = [block.experts for block in blocks]
    if config.mode == "router":
        return routers
    return [*experts, *routers] if config.router else experts


def _by_expert(experts: nn.Module, moments: Mapping[str, Tensor]) -> dict[int, list[bool]]:
    """Expert -> whether each of its tensors has moved; tensors are `[K, ...]`, or of one expert."""
    found: dict[int, list[bool]] = {}
    for name, moment in moments.items():
        alone = next(
            (int(part.rpartition("_")[2]) for part in name.split(".") if _numbered(part)), None
        )
        if alone is not None:
            found.setdefault(alone, []).append(bool(moment.any()))
            continue
        for expert, had_gradient in enumerate(moved(moment).tolist()):
            found.setdefault(expert, []).append(had_gradient)
    return dict(sorted(found.items()))


def _numbered(part: str) -> bool:
    """`3` or `expert_3`."""
    return part.rpartition("_")[2].isdigit() and part.rpartition("_")[0] in ("", "expert")
