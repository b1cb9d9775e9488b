"""What holds for every deciding method, whatever it decides by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from stages.calibrate.statistics import LayerStatistics
from stages.errors import StatisticsError
from stages.group.budget import Sizes
from stages.group.config import (
    METHODS,
    AnyMethod,
    Budget,
    Ean,
    Frequency,
    HcSmoe,
    McSmoe,
    MergeMoe,
    Mixed,
    Msan,
    Naee,
    Random,
    Ream,
    Reap,
    Stun,
    Uncurl,
)
from stages.group.methods import DECIDE
from stages.group.stage import decide
from tests.stages.group.observed import label, observed_layer, random_layer, random_tokens
from tests.tiny import PROPERTY

CONFIGS: list[AnyMethod] = [
    McSmoe(),
    McSmoe(scope="global"),
    Uncurl(),
    Uncurl(center_logits="token", zero_diagonal=True),
    Uncurl(grouping="frequency_merge"),
    Uncurl(grouping="frequency_prune"),
    HcSmoe(),
    HcSmoe(linkage="complete"),
    Ream(),
    MergeMoe(),
    Frequency(),
    Reap(),
    Ean(),
    Ean(mean=True),
    Msan(),
    Msan(squared=False),
    Stun(),
    Stun(others="merge"),
    Naee(),
    Mixed(),
    Mixed(drop=False, group_size=None),
    Mixed(merge=False),
    Random(),
    Random(others="merge"),
]


def over(configs: list[AnyMethod]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", configs, ids=label)


EVERY = over(CONFIGS)
FEW = settings(PROPERTY, max_examples=6, suppress_health_check=[HealthCheck.filter_too_much])
SHAPE = {"experts": st.integers(2, 9), "seed": st.integers(0, 999)}
SIZES = Sizes(fixed=0, per_expert=1, layers=3)


def with_budget(config: AnyMethod, per_layer: float) -> AnyMethod:
    return config.model_copy(update={"budget": Budget(experts_per_layer=per_layer)})


def layers_of(experts: int, seed: int) -> list[LayerStatistics]:
    return [random_layer(experts, seed + layer, layer=layer) for layer in range(3)]


def has_ties(statistics: LayerStatistics) -> bool:
    return len(set(statistics.sums["selected"].tolist())) < statistics.num_experts


@EVERY
@FEW
@given(data=st.data(), **SHAPE)
def test_the_budget_is_met_to_the_expert_by_dropping_or_by_merging(
    config: AnyMethod, experts: int, seed: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, experts))

    found = decide(with_budget(config, kept), layers_of(experts, seed), SIZES)

    assert sum(len(each.representatives) for each in found) == 3 * kept
    for each in found:
        assert config.uneven or len(each.representatives) == kept
        assert all(r in m for r, m in zip(each.representatives, each.members, strict=True))
        dropped = each.group.count(None)
        if config.prunes or not config.may_drop:
            assert dropped == (experts - kept if config.prunes else 0)
        assert len(each.weight) == experts
        assert all(0 <= weight < np.inf for weight in each.weight)


@EVERY
def test_the_same_statistics_give_the_same_decision(config: AnyMethod) -> None:
    first, again = (decide(with_budget(config, 3), layers_of(7, 5), SIZES) for _ in range(2))

    assert first == again


@over([c for c in CONFIGS if c.method != "random"])
@FEW
@given(data=st.data(), **SHAPE)
def test_relabelled_experts_get_the_relabelled_decision(
    config: AnyMethod, experts: int, seed: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, experts - 1))
    logits, outputs = random_tokens(experts, seed, tokens=160)
    order = np.random.default_rng(seed).permutation(experts)
    statistics = observed_layer(logits, outputs)
    # Ids decide between equals, and relabelling changes them.
    assume(not has_ties(statistics))
    relabelled = observed_layer(logits[:, order], outputs[:, order])

    (plain,) = decide(with_budget(config, kept), [statistics], SIZES)
    (moved,) = decide(with_budget(config, kept), [relabelled], SIZES)

    kept_by = {
        int(order[r]): {int(order[m]) for m in moved.members[g]}
        for g, r in enumerate(moved.representatives)
    }
    assert kept_by == {r: set(plain.members[g]) for g, r in enumerate(plain.representatives)}


@EVERY
@FEW
@given(parts=st.integers(2, 7), **SHAPE)
def test_neither_the_order_of_tokens_nor_shards_change_a_decision(
    config: AnyMethod, experts: int, seed: int, parts: int
) -> None:
    logits, outputs = random_tokens(experts, seed)
    order = np.random.default_rng(seed).permutation(len(logits))
    whole, sharded = (
        observed_layer(logits, outputs),
        observed_layer(logits[order], outputs[order], parts=parts),
    )

    found = [decide(with_budget(config, experts - 1), [each], SIZES) for each in (whole, sharded)]

    assert found[0][0].group == found[1][0].group
    assert found[0][0].representatives == found[1][0].representatives


@over([c for c in CONFIGS if not c.uneven])
def test_skipped_layers_change_nothing_in_the_others(config: AnyMethod) -> None:
    layers = layers_of(6, 1)
    skipping = with_budget(config, 2).model_copy(update={"skip_layers": (1,)})

    found = decide(skipping, layers, SIZES)

    assert found[1].group == tuple(range(6))
    whole = decide(with_budget(config, 2), layers, SIZES)
    assert [found[0], found[2]] == [whole[0], whole[2]]


@EVERY
def test_equal_experts_are_no_obstacle(config: AnyMethod) -> None:
    """All logits zero, all outputs the same: every similarity, score and distance is tied."""
    layer = observed_layer(np.zeros((20, 6)), np.ones((20, 6, 3)))

    for kept in range(1, 7):
        (found,) = decide(with_budget(config, kept), [layer], SIZES)
        assert len(found.representatives) == kept


@over([c for c in CONFIGS if c.needs])
def test_a_method_says_what_it_lacks(config: AnyMethod) -> None:
    bare = [LayerStatistics(each.layer, each.sums) for each in layers_of(6, 0)]

    with pytest.raises(StatisticsError) as caught:
        decide(with_budget(config, 2), bare, SIZES)

    expected = {"subsample": "calibrate.sample", "router": "rows", "weights": "weights"}
    assert expected[config.needs[0]] in str(caught.value)


@over([c for c in CONFIGS if not c.needs])
def test_routing_sums_are_all_that_the_other_methods_read(config: AnyMethod) -> None:
    full = layers_of(6, 0)
    bare = [LayerStatistics(each.layer, each.sums) for each in full]

    asked = with_budget(config, 2)

    assert decide(asked, bare, SIZES) == decide(asked, full, SIZES)


def test_every_method_is_tested_here_and_says_when_to_use_it() -> None:
    assert {config.method for config in CONFIGS} == set(METHODS) - {"coalesce"} == set(DECIDE)
    for config in map(METHODS.__getitem__, DECIDE):
        text = config.__doc__ or ""
        assert "Use when: " in text
        assert "\n" not in text.strip()
        assert "arXiv" in text or config in (Frequency, Mixed, Random)
