"""Rows (or columns) of S go while the student is trained, by sensitivity (MC-SMoE, section 3.3).

I(row) = mean over its values of |w dL/dw|, smoothed over steps by `beta` (PLATON without its
uncertainty, as in the paper's code, but without that code's lag of one step). All rows of all
layers, matrices and experts are ranked together; the best stay, up to a share of the values of all
S that falls by the cubic schedule (`stages/compress/schedule.py`). What falls out is set to zero
after every step and may come back: its gradient goes on.

The file format wants as many rows in every expert of a matrix. So the ranking decides how many rows
a matrix of a layer keeps in the mean of its experts, to the nearest whole one, and every expert
keeps its own best: layers and matrices differ, experts of one matrix do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import CheckpointError
from stages.compress.schedule import kept_share
from stages.recover.config import PruneConfig
from stages.recover.state import Named

_S = ".s"


class Pruning:
    """What is known of every row of S, and which stay."""

    def __init__(
        self, trained: Mapping[str, nn.Parameter], config: PruneConfig, steps: int
    ) -> None:
        """Raises CheckpointError where no S is trained."""
        self._parts = {n: p for n, p in trained.items() if n.endswith(_S) and p.dim() == 3}
        self._config, self._steps = config, steps
        if not self._parts:
            raise CheckpointError(
                "the student has no S that is trained",
                "give a mapped checkpoint with U V + S, and recover.mode=experts or full",
            )
        self.scores: Named = {n: torch.zeros(p.shape[:2]) for n, p in self._parts.items()}

    def load(self, scores: Named) -> None:
        """Goes on from a state."""
        self.scores = dict(scores)

    def observe(self) -> None:
        """Takes a step's gradients, before they are applied; a value without one counts as zero."""
        for name, part in self._parts.items():
            found = torch.zeros(part.shape[:2])
            if part.grad is not None:
                found = (part.detach() * part.grad).abs().mean(dim=2).float().cpu()
            self.scores[name] = (
                self._config.beta * self.scores[name] + (1 - self._config.beta) * found
            )

    def apply(self, step: int) -> dict[str, Tensor]:
        """Zeroes what falls out after `step` updates; returns rows that stay, `[K, n]` by name."""
        config = self._config
        share = kept_share(step, self._steps, config.warmup, config.final, config.target)
        widths = {name: part.shape[2] for name, part in self._parts.items()}
        kept = kept_rows(self.scores, widths, share)
        for name, part in self._parts.items():
            gone = torch.ones(part.shape[:2], dtype=torch.bool)
            gone.scatter_(1, kept[name], False)
            part.data[gone.to(part.device)] = 0
        return kept


def kept_rows(scores: Named, widths: Mapping[str, int], share: float) -> dict[str, Tensor]:
    """The rows that stay, `[K, n]` ascending, for every S.

    Args:
        scores: name -> `[K, n]` importance of its rows.
        widths: name -> values of a row.
        share: of the values of all S together; ties go to the earlier name, expert and row.
    """
    names = sorted(scores)
    counts = dict.fromkeys(names, 0)
    if share >= 1:
        counts = {name: scores[name].numel() for name in names}
    elif share > 0:
        every = torch.cat([scores[name].flatten() for name in names])
        owner = torch.cat([torch.full((scores[n].numel(),), i) for i, n in enumerate(names)])
        values = torch.tensor([widths[name] for name in names])[owner]
        order = every.argsort(descending=True, stable=True)
        fits = values[order].cumsum(0) <= share * int(values.sum())
        found = torch.bincount(owner[order[fits]], minlength=len(names)).tolist()
        counts = dict(zip(names, found, strict=True))
    kept = {}
    for name in names:
        experts, rows = scores[name].shape
        count = min(int(counts[name] / experts + 0.5), rows)
        best = scores[name].argsort(dim=1, descending=True, stable=True)[:, :count]
        kept[name] = best.sort(dim=1).values
    return kept


@dataclass(frozen=True)
class Cut:
    """What pruning leaves of a student's files: tensors of other sizes, and those that are gone."""

    tensors: Named
    gone: frozenset[str]
    config: dict[str, Any]  # config.json


def cut_of(
    kept: Mapping[str, Tensor], values: Named, indices: Named, config: dict[str, Any]
) -> Cut:
    """The pruned S in the form of the format: `index` and rows, nothing else.

    Args:
        kept: name of S -> rows that stay `[K, n]`, of those that the student has.
        values: name of S -> trained `[K, N, in]`.
        indices: name of S -> the student's index `[K, N]`.
        config: the student's config.json.
    """
    tensors: Named = {}
    gone: set[str] = set()
    factors = {layer: dict(each) for layer, each in config["expert_factors"].items()}
    for name, rows in kept.items():
        base = name.removesuffix(_S)
        path = base.split(".")
        layer, matrix = path[path.index("layers") + 1], path[-1]
        factors[layer][matrix] = [factors[layer][matrix][0], rows.shape[1]]
        if not rows.shape[1]:
            gone |= {name, f"{base}.index"}
            continue
        tensors[f"{base}.index"] = indices[name].gather(1, rows).contiguous()
        wide = rows[:, :, None].expand(-1, -1, values[name].shape[2])
        tensors[name] = values[name].gather(1, wide).contiguous()
    return Cut(tensors, frozenset(gone), config | {"expert_factors": factors})
