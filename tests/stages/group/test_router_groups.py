"""Experts that compete in groups stay in their groups, and every group keeps as many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.moe import MoeCheckpoint
from stages.errors import BudgetError
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.export.layout import placeholder, router_groups, sizes
from stages.group.budget import Sizes
from stages.group.config import METHODS, Budget
from stages.group.decision import from_labels
from stages.group.methods import DECIDE
from stages.group.router_groups import join, split
from stages.group.stage import decide
from tests.planted_families import tiny_model
from tests.tiny import PROPERTY, statistics_of

SIZES = Sizes(0, 1, 2)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    folder = tmp_path_factory.mktemp("deepseek")
    tiny_model("deepseek_v3").save_pretrained(folder)
    return MoeCheckpoint.open(folder)


@PROPERTY
@given(
    method=st.sampled_from(sorted(n for n in DECIDE if not METHODS[n].needs)),
    selected=st.lists(st.integers(0, 50), min_size=12, max_size=12),
    groups=st.sampled_from([2, 3, 4]),
    each=st.integers(1, 3),
)
def test_every_group_keeps_the_same_number_and_its_own_experts(
    method: str, selected: list[int], groups: int, each: int
) -> None:
    statistics = [statistics_of(layer, selected) for layer in (1, 4)]
    config = METHODS[method](budget=Budget(experts_per_layer=groups * each))

    found = decide(config, statistics, SIZES, router_groups=groups)

    assert [decision.layer for decision in found] == [1, 4]
    for decision, seen in zip(found, statistics, strict=True):
        size = 12 // groups
        assert [r // size for r in decision.representatives] == [
            group for group in range(groups) for _ in range(each)
        ]
        for expert, group in enumerate(decision.group):
            if group is not None:
                assert decision.representatives[group] // size == expert // size
        for group in range(groups):  # in every group, in proportion to what was selected
            part = slice(group * size, (group + 1) * size)
            total = sum(seen.frequency[part]) or 1.0
            assert decision.weight[part] == pytest.approx(tuple(seen.frequency[part] / total))


def test_one_group_decides_as_ever() -> None:
    statistics = [statistics_of(0, [5, 1, 4, 2, 3, 6])]
    config = METHODS["mc_smoe"](budget=Budget(experts_per_layer=3))

    assert decide(config, statistics, SIZES, router_groups=1) == decide(config, statistics, SIZES)


def test_parts_hold_the_sums_of_their_experts_only() -> None:
    whole = statistics_of(3, [1, 2, 3, 4, 5, 6])

    second = split(whole, 2)[1]

    assert second.layer == 7 and second.tokens == whole.tokens
    assert second.sums["selected"].tolist() == [4, 5, 6]
    assert np.array_equal(second.sums["logit_gram"], whole.sums["logit_gram"][3:, 3:])


def test_dropped_experts_stay_dropped() -> None:
    statistics = [statistics_of(0, [1, 1, 1, 1])]
    parts = [from_labels(0, [None, 1], [1, 1]), from_labels(1, [0, None], [1, 1])]

    (found,) = join(parts, statistics, 2)

    assert found.group == (None, 0, 1, None) and found.representatives == (1, 2)


# The native format --------------------------------------------------------------------------------


def test_only_the_native_format_needs_the_groups(moe: MoeCheckpoint) -> None:
    assert moe.router_groups == 2
    assert router_groups(moe, ExportConfig(format="native")) == 2
    assert router_groups(moe, ExportConfig(format="mapped")) == 1


@pytest.mark.parametrize(("asked", "valid"), [(1, 4), (4, 4), (5, 6), (7, 8)])
def test_the_next_number_that_the_router_can_choose_of(
    moe: MoeCheckpoint, asked: int, valid: int
) -> None:
    """Two groups, of which a token may use one: each keeps two for its score and for top-2."""
    assert moe.native_count(asked) == valid


def test_a_number_that_the_groups_cannot_share_is_refused(moe: MoeCheckpoint) -> None:
    decisions = placeholder(moe, dict.fromkeys(moe.layers, 5))

    with pytest.raises(BudgetError, match=r"5 of 8 experts cannot be shared out to the 2 groups"):
        FORMATS["native"].check(moe, decisions)
    with pytest.raises(BudgetError, match="keep 6, or use export"):
        FORMATS["native"].check(moe, decisions)
    FORMATS["mapped"].check(moe, decisions)


def test_an_unbalanced_decision_is_not_written(moe: MoeCheckpoint) -> None:
    layer = moe.layers[0]
    decision = from_labels(layer, [0, 1, 2, 3, 3, 3, 3, 3], [1.0] * 8)
    experts = [moe.read_expert(layer, expert) for expert in decision.representatives]

    with pytest.raises(BudgetError, match=r"keeps \[4, 0\] experts in the 2 router groups"):
        FORMATS["native"].layer_tensors(moe, decision, experts, {}, ExportConfig())


def test_a_step_of_a_native_budget_is_an_expert_per_group(moe: MoeCheckpoint) -> None:
    expert = 3 * 32 * 16 * 4
    row = 32 * 4 + 4

    found = sizes(moe, ExportConfig())

    assert 0 <= found.per_expert - (expert + row) < 400  # the rest is text of headers
    assert found.layers == len(moe.layers)


def test_a_greedy_router_has_no_groups(tmp_path: Path) -> None:
    tiny_model("deepseek_v2", topk_method="greedy").save_pretrained(tmp_path)

    assert MoeCheckpoint.open(tmp_path).router_groups == 1
