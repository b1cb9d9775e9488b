"""From statistics to decisions for every layer."""

from __future__ import annotations

import pytest

from stages.calibrate.statistics import LayerStatistics
from stages.errors import BudgetError, StatisticsError
from stages.group.budget import Sizes
from stages.group.config import METHODS, AnyMethod, Budget, Frequency, McSmoe, Reap
from stages.group.methods import DECIDE
from stages.group.part import part
from stages.group.stage import decide
from tests.stages.group.observed import random_layer
from tests.tiny import statistics_of

SIZES = Sizes(fixed=1000, per_expert=100, layers=3)
STATISTICS = [statistics_of(layer, [8, 7, 6, 5, 4, 3 + layer]) for layer in range(3)]


@pytest.mark.parametrize("config", [McSmoe(), Frequency(), Reap()], ids=lambda c: c.method)
def test_every_layer_gets_a_decision_in_order(config: AnyMethod) -> None:
    found = decide(config, list(reversed(STATISTICS)), SIZES)

    assert [each.layer for each in found] == [0, 1, 2]
    assert [len(each.representatives) for each in found] == [3, 3, 3]


@pytest.mark.parametrize("method", [McSmoe, Frequency, Reap])
def test_keeping_all_experts_is_the_identity(method: type[AnyMethod]) -> None:
    for each in decide(method(budget=Budget(keep_ratio=1.0)), STATISTICS, SIZES):
        assert each.group == each.representatives == tuple(range(6))


@pytest.mark.parametrize("method", [McSmoe, Frequency, Reap])
def test_skipped_layers_keep_all_and_take_nothing_from_the_budget(
    method: type[AnyMethod],
) -> None:
    config = method(budget=Budget(experts_per_layer=2), skip_layers=(1,))

    found = decide(config, STATISTICS, SIZES)

    assert [len(each.representatives) for each in found] == [2, 6, 2]


def test_all_layers_may_be_skipped() -> None:
    found = decide(McSmoe(skip_layers=(0, 1, 2)), STATISTICS, SIZES)

    assert [len(each.representatives) for each in found] == [6, 6, 6]


@pytest.mark.parametrize("skip", [(), (0,), (0, 2)])
def test_a_budget_in_bytes_holds_with_skipped_layers(skip: tuple[int, ...]) -> None:
    config = McSmoe(scope="global", budget=Budget(target_bytes=2500), skip_layers=skip)

    kept = sum(len(each.representatives) for each in decide(config, STATISTICS, SIZES))

    assert kept == 15


def test_merging_drops_no_expert_and_pruning_merges_none() -> None:
    merged = decide(McSmoe(), STATISTICS, SIZES)
    pruned = decide(Frequency(), STATISTICS, SIZES)

    assert all(group is not None for each in merged for group in each.group)
    assert all(len(members) == 1 for each in pruned for members in each.members)


def test_a_layer_without_tokens_is_refused() -> None:
    empty = statistics_of(1, [0] * 6)
    empty.sums["tokens"][:] = 0

    with pytest.raises(StatisticsError, match="layer 1 saw no token"):
        decide(McSmoe(), [STATISTICS[0], empty], SIZES)


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(BudgetError):
        decide(McSmoe(budget=Budget(target_bytes=1)), STATISTICS, SIZES)


def test_the_same_statistics_give_the_same_decisions() -> None:
    again = [LayerStatistics(s.layer, {k: v.copy() for k, v in s.sums.items()}) for s in STATISTICS]

    assert decide(McSmoe(), STATISTICS, SIZES) == decide(McSmoe(), again, SIZES)


def test_every_method_has_a_config_and_a_function() -> None:
    # coalesce keeps every expert: its width follows from the budget alone.
    assert set(METHODS) == {*DECIDE, "coalesce"}


@pytest.mark.parametrize("method", [METHODS[name] for name in DECIDE], ids=DECIDE)
def test_groups_of_a_router_are_decided_one_by_one(method: type[AnyMethod]) -> None:
    """Two layers of 3 groups of 4 experts; every group keeps 2, from what it alone did."""
    layers = [random_layer(12, layer, layer=layer) for layer in range(2)]
    config = method(budget=Budget(experts_per_layer=6))

    found = decide(config, layers, SIZES, router_groups=3)

    for decision, layer in zip(found, layers, strict=True):
        for group in range(3):
            ids = range(4 * group, 4 * group + 4)
            alone = part(layer, ids, layer=3 * layer.layer + group)
            (expected,) = DECIDE[config.method](config, [alone], 2)
            kept = [r - 4 * group for r in decision.representatives if r in ids]
            assert tuple(kept) == expected.representatives
            assert decision.weight[4 * group : 4 * group + 4] == expected.weight
            for representative, members in zip(
                decision.representatives, decision.members, strict=True
            ):
                assert representative // 4 == members[0] // 4 == members[-1] // 4
