"""From a budget to the exact number of experts, per model and per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from stages.errors import BudgetError
from stages.group.config import Budget
from stages.group.width import Widths

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a checkpoint, from headers alone."""

    fixed: int  # everything but routed experts and what shrinks with them
    per_expert: int  # one expert of one layer with what belongs to it
    layers: int  # MoE layers of the checkpoint, skipped ones included
    widths: Widths | None = None  # the same in neurons; None: experts are not narrowed


def total_experts(budget: Budget, layers: int, num_experts: int, sizes: Sizes) -> int:
    """Experts to keep over all merged layers; halves are rounded up.

    A budget in bytes pays for the skipped layers first, which keep all their experts.

    Raises:
        BudgetError: fewer than one per layer, or more than there are.
    """
    full = layers * num_experts
    if budget.target_bytes is not None:
        skipped = (sizes.layers - layers) * num_experts
        total = (budget.target_bytes - sizes.fixed) // sizes.per_expert - skipped
    elif budget.keep_ratio is not None:
        total = _round_half_up(Fraction(str(budget.keep_ratio)) * full)
    else:
        total = _round_half_up(Fraction(str(budget.experts_per_layer)) * layers)
    if total < layers:
        raise BudgetError(
            f"the budget leaves {max(total, 0)} experts for {layers} layers;"
            f" everything else takes {sizes.fixed:,} bytes, one expert {sizes.per_expert:,}",
            "raise the budget: every layer needs at least one expert",
        )
    if total > full and budget.target_bytes is None:
        raise BudgetError(
            f"the budget asks for {total} experts, the model has {full}",
            f"experts_per_layer must not exceed {num_experts}",
        )
    return min(total, full)


def uniform(total: int, layers: Sequence[int], num_experts: int) -> dict[int, int]:
    """The same number for every layer: the largest that does not exceed the budget."""
    return dict.fromkeys(layers, min(total // len(layers), num_experts))


def adaptive(total: int, frequency: Mapping[int, Array], minimum: int) -> dict[int, int]:
    """MC-SMoE section 3.2: dominant experts chosen over all layers, with an exact budget.

    Every layer keeps its `minimum` most frequent experts; what is left of the budget goes to the
    highest row-normalised frequencies anywhere. Ties go to the lower layer, then the lower id. The
    published code compares with a threshold instead and loses whole layers to ties.

    Args:
        total: experts to keep over all layers of `frequency`.
        frequency: layer -> [E] row-normalised frequency.

    Raises:
        BudgetError: `minimum` per layer is more than the budget.
    """
    if total < minimum * len(frequency):
        raise BudgetError(
            f"a budget of {total} experts cannot keep {minimum} in each of {len(frequency)} layers",
            "raise the budget or lower `min_per_layer`",
        )
    kept = dict.fromkeys(frequency, minimum)
    ranked = [
        (-float(values[expert]), layer, int(expert))
        for layer, values in frequency.items()
        for expert in by_rank(values)[minimum:]
    ]
    for _, layer, _ in sorted(ranked)[: total - minimum * len(frequency)]:
        kept[layer] += 1
    return kept


def thresholded(total: int, frequency: Mapping[int, Array]) -> dict[int, int]:
    """The adaptive number as the code of the MC-SMoE paper counts it, which may keep fewer.

    The most frequent expert of every layer counts as 1; dominant is what exceeds the value behind
    the first `total` of all layers. With ties at that value all of them are lost: two layers with
    equal frequencies keep one expert each, whatever the budget.

    Args:
        total: as in `adaptive`; at least one per layer.
        frequency: layer -> [E] row-normalised frequency.
    """
    counted = {layer: values.copy() for layer, values in frequency.items()}
    for values in counted.values():
        values[np.argmax(values)] = 1.0
    ranked = np.sort(np.concatenate(list(counted.values())))[::-1]
    # Nothing lies behind the last: the whole model stays. (The paper's code loses an expert.)
    bound = ranked[total] if total < len(ranked) else -1.0
    # An expert that is all of its layer has frequency 1 in earnest; every layer keeps one.
    return {layer: max(int((values > bound).sum()), 1) for layer, values in counted.items()}


def by_rank(values: Array) -> Array:
    """Ids from the highest value to the lowest; equal values in the order of their ids."""
    return np.argsort(-values, kind="stable")


def _round_half_up(value: Fraction) -> int:
    return int(value + Fraction(1, 2))
