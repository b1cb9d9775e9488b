"""What pruning leaves of a student's files: `index` and rows of S, and config.json with numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.checkpoint import Checkpoint
from stages.recover.pruning import S
from stages.recover.state import Named


@dataclass(frozen=True)
class Cut:
    """Tensors of other sizes than the student has, and those that are gone."""

    tensors: Named
    gone: frozenset[str]
    config: dict[str, Any]  # config.json

    @property
    def numbers(self) -> dict[str, dict[str, int]]:
        """Layer -> field of `Expert` -> rows of S."""
        return {
            layer: {name.removesuffix("_proj"): rows for name, (_, rows) in each.items()}
            for layer, each in self.config["expert_factors"].items()
        }


def cut_student(student: Checkpoint, values: Named, kept: Mapping[str, Tensor]) -> Cut | None:
    """The pruned S as the files have it, in the type on disk; None: nothing was pruned.

    Args:
        values: name of S -> trained `[K, N, width]`.
        kept: name of S -> rows that stay `[K, n]`, of those that the student has.
    """
    if not kept:
        return None
    indices = {n: f"{n.removesuffix(S)}.index" for n in kept}
    read = student.read(indices.values())
    kinds = {name: student.tensors[name].meta().dtype for name in kept}
    rounded = {name: values[name].to(kinds[name]) for name in kept}
    found = {name: read[index] for name, index in indices.items()}
    return cut_of(kept, rounded, found, student.config)


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
        base = name.removesuffix(S)
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
