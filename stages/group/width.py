"""From a budget to the number of neurons that every expert keeps."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from stages.errors import BudgetError
from stages.group.config import Budget

# Neurons whose rows are 16 bytes, which torch's grouped products want: in float32, and in 16 bits.
ALIGNED, HALF_ALIGNED = 4, 8


@dataclass(frozen=True)
class Widths:
    """Bytes of a checkpoint as a function of the width of its experts, from headers alone."""

    neurons: int  # I, of every expert
    fixed: int  # everything that does not shrink with the width
    per_neuron: int  # one neuron of every expert in every layer
    kept: int | None = None  # experts per layer that all this is about; None: all


def kept_width(budget: Budget, num_experts: int, widths: Widths, multiple: int) -> int:
    """The largest multiple of `multiple` within the budget.

    `keep_ratio` is a share of a layer's neurons; `experts_per_layer` stands for the neurons that so
    many whole experts have, so that methods can be compared at equal bytes.

    Raises:
        BudgetError: not even one multiple fits.
    """
    room = int(_room(budget, num_experts, widths))
    width = min(room, widths.neurons) // multiple * multiple
    if width < 1:
        raise BudgetError(
            f"the budget leaves {max(room, 0)} of {widths.neurons} neurons per expert, kept"
            f" in multiples of {multiple}; all else takes {widths.fixed:,} bytes, one neuron of"
            f" every expert {widths.per_neuron:,}",
            "raise the budget, or lower group.multiple",
        )
    return width


def check_kernels(width: int, halves: bool) -> None:
    """Refuses a width at which a native checkpoint opens and computes nothing in its own type.

    Args:
        halves: whether it is stored in 16 bits.

    Raises:
        BudgetError: it is no multiple of 4, or of 8 in 16 bits.
    """
    if width % (HALF_ALIGNED if halves else ALIGNED):
        raise BudgetError(
            f"experts of {width} neurons: transformers' default kernels want rows of 16 bytes,"
            f" a multiple of {ALIGNED} neurons in float32 and of {HALF_ALIGNED} in bfloat16",
            f"set group.multiple={HALF_ALIGNED}",
        )


def kept_steps(budget: Budget, num_experts: int, widths: Widths, multiple: int, layers: int) -> int:
    """Multiples of `multiple` neurons that all layers together may keep, at least one each.

    Raises:
        BudgetError: fewer than one per layer.
    """
    kept_width(budget, num_experts, widths, multiple)
    room = min(_room(budget, num_experts, widths), Fraction(widths.neurons))
    return int(room * layers / multiple)


def spread(steps: int, layers: int, multiple: int) -> list[int]:
    """Widths that use all steps, as even as can be, the first layers the wider ones."""
    each, more = divmod(steps, layers)
    return [multiple * (each + (index < more)) for index in range(layers)]


def _room(budget: Budget, num_experts: int, widths: Widths) -> Fraction:
    """Neurons per expert that the budget pays for."""
    if budget.target_bytes is not None:
        return Fraction(budget.target_bytes - widths.fixed, widths.per_neuron)
    each = Fraction(num_experts, widths.kept or num_experts) * widths.neurons
    if budget.keep_ratio is not None:
        return Fraction(str(budget.keep_ratio)) * each
    return Fraction(str(budget.experts_per_layer)) / num_experts * each
