"""AdamW in one process, by torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stages.recover.config import RecoverConfig
from stages.recover.state import Named

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimiser(Protocol):
    """Takes gradients, and can say and be told where it stands by the names of values."""

    # What is called with ids and mask.
    model: Any

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds a pass's gradients; `last`: a step follows."""

    def step(self, rate: float) -> float:
        """Updates all values; returns the norm of the gradient before it was clipped."""

    def values(self) -> Named:
        """fp32, on the CPU; all ranks call it together."""

    def moments(self) -> tuple[Named, Named]:
        """First and second moments, fp32, on the CPU; all ranks call it together."""

    def load(self, values: Named, first: Named, second: Named, step: int) -> None:
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

    def values(self) -> Named:
        """See `Optimiser`."""
        return {n: p.detach().float().cpu().clone() for n, p in self._trained.items()}

    def moments(self) -> tuple[Named, Named]:
        """See `Optimiser`."""
        first, second = (
            {n: self._moment(p, m) for n, p in self._trained.items()} for m in _MOMENTS
        )
        return first, second

    def load(self, values: Named, first: Named, second: Named, step: int) -> None:
        """See `Optimiser`."""
        for name, parameter in self._trained.items():
            parameter.data.copy_(values[name])
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": first[name].to(parameter.device),
                "exp_avg_sq": second[name].to(parameter.device),
            }

    def _moment(self, parameter: nn.Parameter, which: str) -> Tensor:
        found = self._optimiser.state.get(parameter, {}).get(which)
        zeros = torch.zeros(parameter.shape)
        return zeros if found is None else found.detach().float().cpu().clone()


def adamw(trained: Mapping[str, nn.Parameter], config: RecoverConfig) -> torch.optim.AdamW:
    """Vectors (norms, biases) do not decay."""
    wide = [p for p in trained.values() if p.dim() > 1]
    narrow = [p for p in trained.values() if p.dim() < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((wide, config.weight_decay), (narrow, 0.0))
        if params
    ]
    options: dict[str, Any] = {"betas": config.betas, "eps": config.epsilon}
    return torch.optim.AdamW(groups, lr=config.learning_rate, **options)
