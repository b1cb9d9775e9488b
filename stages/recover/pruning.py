"""Rows (or columns) of S go while the student is trained, by sensitivity (MC-SMoE, section 3.3).

I(row) = mean over its values of |w dL/dw|, smoothed over steps by `beta` (PLATON without its
uncertainty, as in the paper's code, but without that code's lag of one step). What stays falls from
all rows to the target by the cubic schedule (`stages/compress/schedule.py`). What falls out is set
to zero after every step and may come back: its gradient goes on.

The file format wants as many rows in every expert of a matrix, so a matrix has a number of rows and
each expert keeps its own best of them. With `threshold: layer` every matrix goes to its share; with
`global` the bytes of that are divided over all matrices and layers by what rows are worth, as
`stages/compress/threshold.py` divides them. Either way the numbers at the end are those that a
decomposition without training may have: multiples of `multiple`, and bytes to the last row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import CheckpointError
from stages.compress.schedule import kept_share
from stages.compress.sparse import kept_evenly
from stages.compress.threshold import Curve, share_out
from stages.recover.config import PruneConfig
from stages.recover.state import Named

S = ".s"
_INDEX_BYTES = 8


class Pruning:
    """What is known of every row of S, and which stay."""

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        config: PruneConfig,
        steps: int,
        value_bytes: int = 4,
    ) -> None:
        """Must be made before training: rows of equal sensitivity are told apart by the norms that
        they start with.

        Args:
            trained: by name; every S is `[K, N, width]`.
            value_bytes: of a value of S in the files.

        Raises:
            CheckpointError: no S is trained.
        """
        self._parts = {n: p for n, p in trained.items() if n.endswith(S) and p.dim() == 3}
        self._config, self._steps, self._value_bytes = config, steps, value_bytes
        if not self._parts:
            raise CheckpointError(
                "the student has no S that is trained",
                "give a mapped checkpoint with U V + S, and recover.mode=experts or full",
            )
        self._norms = {n: p.detach().float().square().sum(2).cpu() for n, p in self._parts.items()}
        self.scores: Named = {n: torch.zeros(norms.shape) for n, norms in self._norms.items()}

    def load(self, scores: Named) -> None:
        """Goes on from a state."""
        self.scores = dict(scores)

    def observe(self) -> None:
        """Takes a step's gradients, before they are applied; a value without one counts as zero.

        All ranks call it together.
        """
        beta = self._config.beta
        for name, part in self._parts.items():
            found = _sensitivity(part).mean(dim=2).float().cpu()
            self.scores[name] = beta * self.scores[name] + (1 - beta) * found

    def apply(self, step: int) -> dict[str, Tensor]:
        """Zeroes what falls out after `step` updates; returns rows that stay, `[K, n]` by name.

        All ranks call it together.
        """
        kept = strongest_rows(self.scores, self._norms, self.numbers(step))
        for name, part in self._parts.items():
            gone = torch.ones(part.shape[:2], dtype=torch.bool)
            gone.scatter_(1, kept[name], False)
            if bool(gone.any()):
                _zero(part, gone.to(part.device))
        return kept

    def numbers(self, step: int) -> dict[str, int]:
        """Rows that every expert keeps after `step` updates, by name."""
        config, (warmup, final) = self._config, self._config.phases(self._steps)
        # P(t) = P_T + (1 - P_T) left, in rows or bytes instead of shares.
        left = kept_share(step, self._steps, warmup, final, 0.0)
        sizes = {name: part.shape[1] for name, part in self._parts.items()}
        even = {n: kept_evenly(config.target, size, config.multiple) for n, size in sizes.items()}
        if config.threshold == "layer":
            return {n: even[n] + int((sizes[n] - even[n]) * left + 0.5) for n in sizes}
        curves = [self._curve(name, even[name]) for name in sizes]
        goal = sum(each.even * each.row_bytes for each in curves)
        every = sum(len(each.gains) * each.row_bytes for each in curves)
        budget = goal + int((every - goal) * left + 0.5)
        return share_out(curves, config.multiple, budget)[0]

    def _curve(self, name: str, even: int) -> Curve:
        """What rows of every expert are worth, its strongest first, added up over experts."""
        experts, _, width = self._parts[name].shape
        falling = self.scores[name].double().sort(dim=1, descending=True).values
        row_bytes = experts * (width * self._value_bytes + _INDEX_BYTES)
        return Curve(0, name, width * falling.sum(dim=0).numpy(), row_bytes, even)


def strongest_rows(scores: Named, norms: Named, numbers: Mapping[str, int]) -> dict[str, Tensor]:
    """The rows that stay, `[K, n]` ascending, for every S.

    Args:
        scores, norms: name -> `[K, N]`; equal scores are told apart by norms, then by position.
        numbers: name -> n.
    """
    kept = {}
    for name, count in numbers.items():
        longest = norms[name].argsort(dim=1, descending=True, stable=True)
        best = scores[name].gather(1, longest).argsort(dim=1, descending=True, stable=True)
        kept[name] = longest.gather(1, best[:, :count]).sort(dim=1).values
    return kept


def _sensitivity(part: nn.Parameter) -> Tensor:
    """|w dL/dw|, the shape of `part`; zero without a gradient."""
    values: Any = part.detach()
    gradient: Any = part.grad
    if _dealt_out(part):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        values, gradient = safe_get_full_fp32_param(part), safe_get_full_grad(part)
    if gradient is None:
        return torch.zeros_like(values)
    found: Tensor = (values.float() * gradient.float()).abs()
    return found


def _zero(part: nn.Parameter, gone: Tensor) -> None:
    """Rows `gone` `[K, N]`, where they are updated and where the model reads them."""
    if _dealt_out(part):
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        values = safe_get_full_fp32_param(part)
        values[gone] = 0
        safe_set_full_fp32_param(part, values)
    part.data[gone] = 0


def _dealt_out(part: nn.Parameter) -> bool:
    """Whether DeepSpeed (ZeRO 1 or 2) keeps parts of it on several ranks."""
    return hasattr(part, "_hp_mapping")
