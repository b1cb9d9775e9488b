"""Whether a checkpoint's experts can be decomposed as asked; from headers alone."""

from __future__ import annotations

from collections.abc import Sequence

from models.expert import Expert
from models.moe import MoeCheckpoint
from models.support import require
from stages.compress.config import CompressConfig
from stages.compress.layer import applies, shapes
from stages.errors import BudgetError


def check(
    config: CompressConfig,
    moe: MoeCheckpoint,
    experts: Sequence[tuple[int, Expert]],
    *,
    small: bool,
) -> None:
    """Refuses ranks that do not exist and factors that save nothing.

    Args:
        experts: layer, and one of its experts without memory, of the width that is written.
        small: the factors are stored as such (`mapped`), and must be smaller than the matrix.

    Raises:
        BudgetError: with the sizes.
        UnsupportedFeature: the family's experts have no such form.
    """
    unknown = sorted(set(config.skip_layers) - set(moe.layers))
    if unknown:
        raise BudgetError(
            f"compress.skip_layers names {unknown}, the model's MoE layers are"
            f" {moe.layers[0]} to {moe.layers[-1]}",
            "correct `compress.skip_layers`",
        )
    if small:
        require(moe.family, "compress")
    for layer, expert in experts:
        if applies(config, layer):
            _check_expert(config, layer, expert, small)


def _check_expert(config: CompressConfig, layer: int, expert: Expert, small: bool) -> None:
    for name, shape in shapes(expert, config, layer).items():
        limit = min(shape.height, shape.width)
        if shape.rank > limit:
            raise BudgetError(
                f"compress.rank is {shape.rank}; the {name} projections of layer {layer} are"
                f" {shape.height} x {shape.width} and have at most rank {limit}",
                f"set compress.rank to less than {limit}, or compress.ratio",
            )
        whole = shape.height * shape.width
        if small and shape.values >= whole:
            raise BudgetError(
                f"U, V and {config.sparse:.0%} of S of a {shape.height} x {shape.width} {name}"
                f" projection (layer {layer}, rank {shape.rank}) hold {shape.values:,} values, the"
                f" projection itself {whole:,}",
                "lower compress.rank (or ratio) or compress.sparse, or leave out `compress`",
            )
