"""Experts with massive activations stay as they are, within the budget."""

from __future__ import annotations

import numpy as np
import pytest

from stages.calibrate.statistics import LayerStatistics
from stages.errors import BudgetError
from stages.group.budget import Sizes
from stages.group.config import METHODS, Budget, McSmoe, Naee, Reap
from stages.group.methods import DECIDE
from stages.group.stage import decide
from stages.group.super_experts import protected_lines, super_experts
from tests.stages.group.observed import random_layer

SIZES = Sizes(fixed=0, per_expert=1, layers=4)


def layers(peaks: dict[tuple[int, int], float], count: int = 4) -> list[LayerStatistics]:
    """Layers of 8 experts whose largest activations are about 1, but for `peaks`."""
    found = [random_layer(8, layer, layer=layer) for layer in range(count)]
    for each in found:
        each.sums["max_abs"][:] = 1 + 0.01 * np.arange(8)
    for (layer, expert), value in peaks.items():
        found[layer].sums["max_abs"][expert] = value
    return found


def test_only_what_lies_above_nearly_all_and_near_the_largest_is_super() -> None:
    many = layers({(0, 3): 500.0, (17, 1): 900.0, (20, 2): 60.0}, count=60)

    # 480 experts: the 99.5th percentile leaves 3; a tenth of 900 is 90.
    assert super_experts(many) == {0: (3,), 17: (1,)}


def test_equal_experts_are_not_super() -> None:
    equal = layers({})
    for each in equal:
        each.sums["max_abs"][:] = 1.0

    assert super_experts(equal) == {}


@pytest.mark.parametrize("method", [METHODS[name] for name in DECIDE], ids=DECIDE)
def test_every_method_leaves_them_alone_and_keeps_its_budget(method: type) -> None:
    statistics = layers({(2, 5): 300.0})
    # The worst expert of its layer by every score.
    for name in ("selected", "norm", "norm_sq", "gate_norm"):
        statistics[2].sums[name][5] = 0
    config = method(budget=Budget(experts_per_layer=3), protect_super_experts=True)

    found = decide(config, statistics, SIZES)

    assert sum(len(each.representatives) for each in found) == 12
    assert found[2].action(5) == "keep"
    assert 5 in found[2].representatives
    without = decide(config.model_copy(update={"protect_super_experts": False}), statistics, SIZES)
    for layer in (0, 1, 3):
        assert found[layer] == without[layer]


def test_unprotected_they_go() -> None:
    statistics = layers({(2, 5): 300.0})
    statistics[2].sums["gate_norm"][5] = 0

    found = decide(Reap(budget=Budget(experts_per_layer=3)), statistics, SIZES)

    assert found[2].action(5) == "drop"


def test_they_are_listed_when_they_are_protected() -> None:
    statistics = layers({(2, 5): 300.0})

    asked = McSmoe(protect_super_experts=True)

    assert protected_lines(statistics, McSmoe()) == []
    (line,) = protected_lines(statistics, asked)
    assert line.startswith(
        "layer 2: super experts [5] are kept as they are (largest activation 300"
    )


def test_a_layer_without_room_for_others_is_refused() -> None:
    asked = Naee(budget=Budget(experts_per_layer=1), protect_super_experts=True)

    with pytest.raises(BudgetError, match="layer 2 keeps 1 experts, 1 of its experts are super"):
        decide(asked, layers({(2, 5): 300.0}), SIZES)
