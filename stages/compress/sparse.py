"""What is kept of S = W - U V: whole rows or columns, by importance (MC-SMoE after equation 3)."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from models.factored import Axis


def kept_count(share: float, size: int) -> int:
    """`share` of `size` rows, to the nearest whole one (halves up).

    Raises:
        ValueError: a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the kept share must lie between 0 and 1, got {share}")
    return int(Fraction(str(share)) * size + Fraction(1, 2))


def kept_evenly(share: float, size: int, multiple: int) -> int:
    """`share` of `size` rows to the nearest multiple, where every matrix keeps the same share.

    Raises:
        ValueError: a share outside 0..1.
    """
    kept = kept_count(share, size)
    return kept if kept == size else min(to_multiple(kept, multiple), size)


def to_multiple(count: int, multiple: int) -> int:
    """The nearest multiple (halves up), of what is not smaller than one."""
    return count if count < multiple else (2 * count + multiple) // (2 * multiple) * multiple


def importance(rest: Tensor, axis: Axis, inputs: Tensor | None = None) -> Tensor:
    """Importance of every row [H] or column [W] of S `rest` [H, W].

    Args:
        inputs: X [N, W], scaled by the gates: the squared error that dropping the row or the
            column alone makes on them. None, or no token: its squared norm.
    """
    if inputs is None or not len(inputs):
        return rest.square().sum(dim=1 if axis == "rows" else 0)
    seen = inputs.to(rest.dtype)
    if axis == "rows":
        return (seen @ rest.T).square().sum(dim=0)
    return seen.square().sum(dim=0) * rest.square().sum(dim=0)


def strongest(scores: Tensor, count: int) -> Tensor:
    """[count] int64 positions of the highest scores, ascending; ties go to the lower position."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def cut(rest: Tensor, axis: Axis, index: Tensor) -> Tensor:
    """The chosen rows of S [n, W], or its chosen columns as rows [n, H]."""
    return (rest if axis == "rows" else rest.T).index_select(0, index)
