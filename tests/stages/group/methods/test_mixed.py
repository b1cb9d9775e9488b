"""Keep, merge or drop: planted twins are merged, planted idlers dropped, by the predicted error."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from stages.calibrate.statistics import LayerStatistics
from stages.errors import BudgetError
from stages.group.config import Budget, Mixed
from stages.group.decision import LayerDecision, from_labels
from stages.group.methods.mixed import cheapest
from stages.group.predict import predicted_error
from stages.group.stage import decide
from tests.stages.group.methods.test_every_method import SIZES
from tests.stages.group.observed import observed_layer, random_layer


def planted(seed: int, experts: int = 8) -> LayerStatistics:
    """0 and 1 are twins, 2 puts out next to nothing; all others have outputs of their own."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(300, experts))
    outputs = generator.normal(size=(300, experts, 6)) + 3 * generator.normal(size=(1, experts, 6))
    outputs[:, 1] = outputs[:, 0] + 0.01 * generator.normal(size=(300, 6))
    outputs[:, 2] *= 0.01
    return observed_layer(logits, outputs)


def error_of(layer: LayerStatistics, decision: LayerDecision) -> float:
    assert layer.subsample is not None
    return predicted_error(layer.subsample, decision)


@pytest.mark.parametrize("seed", range(3))
def test_twins_are_merged_and_idlers_dropped(seed: int) -> None:
    found = cheapest(Mixed(), planted(seed), 6)

    assert [found.action(expert) for expert in range(3)] == ["merge", "merge", "drop"]
    assert all(found.action(expert) == "keep" for expert in range(3, 8))
    assert found.weight[0] + found.weight[1] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_a_switch_forbids_its_step_and_costs_error(seed: int) -> None:
    layer = planted(seed)

    errors = {}
    for merge, drop in ((True, True), (True, False), (False, True)):
        found = cheapest(Mixed(merge=merge, drop=drop), layer, 6)
        actions = {found.action(expert) for expert in range(8)}
        assert ("merge" in actions) <= merge and ("drop" in actions) <= drop
        errors[merge, drop] = error_of(layer, found)

    assert errors[True, True] < 0.1 * min(errors[True, False], errors[False, True])


def test_the_first_step_is_the_best_there_is() -> None:
    layer = random_layer(6, 3)
    assert layer.subsample is not None

    found = cheapest(Mixed(), layer, 5)

    labels = list(range(6))
    every = [from_labels(0, [None if e == n else e for e in labels], [1.0] * 6) for n in labels]
    for a, b in combinations(labels, 2):
        merged = from_labels(0, [a if e == b else e for e in labels], [1.0] * 6)
        weight = np.array(cheapest_weights(layer, a, b))
        every.append(LayerDecision(0, merged.group, merged.representatives, tuple(weight)))
    assert error_of(layer, found) == pytest.approx(min(error_of(layer, each) for each in every))


def cheapest_weights(layer: LayerStatistics, a: int, b: int) -> list[float]:
    """The weights of a pair with the least error, found by trying."""
    weights, best = [1.0] * layer.num_experts, np.inf
    labels = [a if e == b else e for e in range(layer.num_experts)]
    for share in np.linspace(0, 1, 1001):
        tried = list(weights)
        tried[a], tried[b] = share, 1 - share
        error = error_of(layer, from_labels(0, labels, tried))
        if error < best:
            best, found = error, tried
    return found


def test_groups_stay_within_their_size() -> None:
    layer = random_layer(9, 1)

    for size in (2, 3, None):
        found = cheapest(Mixed(drop=False, group_size=size), layer, 5)
        assert size is None or max(map(len, found.members)) <= size


def test_groups_that_cannot_hold_all_experts_are_refused() -> None:
    asked = Mixed(drop=False, budget=Budget(experts_per_layer=2))

    with pytest.raises(BudgetError, match=r"2 groups of 2 cannot hold 6 experts.*\n*.*") as caught:
        decide(asked, [random_layer(6, 0)], SIZES)

    assert "group.group_size to 3" in str(caught.value)


def test_one_step_must_be_allowed() -> None:
    with pytest.raises(ValueError, match="no expert could go"):
        Mixed(merge=False, drop=False)
