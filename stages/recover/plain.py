"""AdamW in one process, by torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stages.recover.config import RecoverConfig
from stages.recover.state import Kind, State

# What Adam calls its moments.
MOMENTS: dict[Kind, str] = {"first": "exp_avg", "second": "exp_avg_sq"}


class Optimiser(Protocol):
    """Takes gradients, and can say and be told where it stands by the names of values."""

    # What is called with ids and mask.
    model: Any

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds a pass's gradients; `last`: a step follows."""

    def step(self, rate: float) -> float:
        """Updates all values; returns the norm of the gradient before it was clipped."""

    def gathered(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """Name and fp32 tensor on the CPU, one at a time in the model's order, each of which may
        change once training goes on; all ranks walk along together."""

    def load(self, state: State) -> None:
        """Goes on from there."""


class Plain:
    """See `Optimiser`."""

    def __init__(
        self, model: Any, trained: Mapping[str, nn.Parameter], config: RecoverConfig
    ) -> None:
        self.model = model
        self._trained = dict(trained)
        self._clip = config.clip
        self._optimiser = adamw(trained, config)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Optimiser`."""
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it

    def step(self, rate: float) -> float:
        """See `Optimiser`."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        limit = float("inf") if self._clip is None else self._clip
        norm = nn.utils.clip_grad_norm_(self._trained.values(), limit)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return float(norm)

    def gathered(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """See `Optimiser`."""
        for name, parameter in self._trained.items():
            found = parameter if kind == "values" else self._moment(parameter, MOMENTS[kind])
            yield name, found.detach().float().cpu()

    def load(self, state: State) -> None:
        """See `Optimiser`."""
        for name, parameter in self._trained.items():
            parameter.data.copy_(state.read("values", name))
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                **{
                    which: state.read(kind, name).clone().to(parameter.device)
                    for kind, which in MOMENTS.items()
                },
            }

    def _moment(self, parameter: nn.Parameter, which: str) -> Tensor:
        found: Tensor | None = self._optimiser.state.get(parameter, {}).get(which)
        return torch.zeros(parameter.shape) if found is None else found


def adamw(trained: Mapping[str, nn.Parameter], config: RecoverConfig) -> torch.optim.AdamW:
    """Vectors (norms, biases) do not decay."""
    wide = [p for p in trained.values() if len(shape_of(p)) > 1]
    narrow = [p for p in trained.values() if len(shape_of(p)) < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((wide, config.weight_decay), (narrow, 0.0))
        if params
    ]
    options: dict[str, Any] = {"betas": config.betas, "eps": config.epsilon}
    return torch.optim.AdamW(groups, lr=config.learning_rate, **options)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Of the whole value; a parameter that is dealt out (ZeRO 3) holds nothing between uses."""
    found: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return found
