"""One matrix of one expert as U V + S, in the type that it is stored in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.factored import Axis, Factored
from stages.compress.config import CompressConfig
from stages.compress.lowrank import at_least_fp32, fast_factors, rank_from_ratio, residual
from stages.compress.randomised import randomised_svd, worthwhile
from stages.compress.sparse import cut, importance, kept_evenly, strongest, to_multiple
from stages.compress.whiten import second_moments, whitened_factors


@dataclass(frozen=True)
class Shape:
    """Rank and number of kept rows or columns of one matrix [height, width]."""

    height: int
    width: int
    rank: int
    kept: int
    axis: Axis

    @property
    def values(self) -> int:
        """r (H + W) and what is kept of S; indices not counted."""
        along = self.width if self.axis == "rows" else self.height
        return self.rank * (self.height + self.width) + self.kept * along


def shape_of(config: CompressConfig, height: int, width: int, kept: int | None = None) -> Shape:
    """What a matrix of this size becomes; with `kept` rows of S where they were decided."""
    rank = config.rank
    if rank is None:
        assert config.ratio is not None
        wanted = rank_from_ratio(config.ratio, height, width)
        rank = min(to_multiple(wanted, config.multiple), height, width)
    if kept is None:
        along = height if config.axis == "rows" else width
        kept = kept_evenly(config.sparse, along, config.multiple)
    return Shape(height, width, rank, kept, config.axis)


@dataclass(frozen=True)
class Measured:
    """A decomposed matrix, and what the rows or columns of its S are worth."""

    factored: Factored
    scores: Tensor  # [H] or [W], see `importance`
    energy: float  # what the whole matrix is worth, measured alike


def factor(
    weight: Tensor, config: CompressConfig, inputs: Tensor | None = None, kept: int | None = None
) -> Factored:
    """Decomposes `weight` [H, W]; on the meta device it gives the shapes alone.

    Everything is computed in fp32 or better. S is what the *rounded* factors leave over, and is
    rounded once itself.

    Args:
        inputs: [N, W] sampled inputs of the matrix times their gates; needed for whitening and
            for importance by activations.
        kept: rows or columns of S; None: `config.sparse` of them.
    """
    height, width = weight.shape
    kind, shape = weight.dtype, shape_of(config, height, width, kept)
    left, right, rest = _parts(weight, shape, config, inputs)
    index = strongest(importance(rest, config.axis, _watched(config, inputs)), shape.kept)
    stored = cut(rest, config.axis, index).to(kind).contiguous()
    return Factored(left, right, index, stored, config.axis)


def measured(weight: Tensor, config: CompressConfig, inputs: Tensor | None = None) -> Measured:
    """`factor` with the importance of all rows or columns, kept or not."""
    watched = _watched(config, inputs)
    made = factor(weight, config, inputs)
    rest = residual(weight, at_least_fp32(made.left), at_least_fp32(made.right))
    energy = importance(at_least_fp32(weight), config.axis, watched).double().sum()
    return Measured(made, importance(rest, config.axis, watched), float(energy))


def _watched(config: CompressConfig, inputs: Tensor | None) -> Tensor | None:
    return inputs if config.importance == "activations" else None


def _parts(
    weight: Tensor, shape: Shape, config: CompressConfig, inputs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """U and V as stored, and S of what they are as stored."""
    found = _factors(weight, shape, config, inputs)
    left, right = (each.to(weight.dtype).contiguous() for each in found)
    return left, right, residual(weight, at_least_fp32(left), at_least_fp32(right))


def _factors(
    weight: Tensor, shape: Shape, config: CompressConfig, inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    if config.whiten and inputs is not None:
        return whitened_factors(weight, shape.rank, second_moments(inputs, config.ridge))
    auto = config.svd == "auto" and worthwhile(shape.rank, weight.shape)
    if config.svd == "randomised" or auto:
        left, values, right = randomised_svd(at_least_fp32(weight), shape.rank)
        root = values.sqrt()
        return left * root, root[:, None] * right
    return fast_factors(weight, shape.rank)
