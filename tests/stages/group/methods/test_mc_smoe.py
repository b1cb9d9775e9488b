"""Dominant experts stay apart; every other joins the one whose logits are most similar."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.calibrate.statistics import LayerStatistics
from stages.group.budget import by_rank
from stages.group.config import Budget, McSmoe
from stages.group.methods.mc_smoe import decide, group_layer, router_cosine
from tests.tiny import PROPERTY, random_permutation, statistics_of

Array = np.ndarray[Any, Any]
LAYERS = {"experts": st.integers(1, 9), "seed": st.integers(0, 999)}


def logits_of(experts: int, seed: int, tokens: int = 40) -> Array:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(tokens, experts)) + generator.normal(size=experts)


def counts_of(experts: int, seed: int) -> list[int]:
    """Distinct counts: ties are resolved by id, which relabelling changes."""
    return [int(x) + 1 for x in np.random.default_rng(seed).permutation(3 * experts)[:experts]]


def slow_cosine(logits: Array) -> Array:
    experts = logits.shape[1]
    found = np.eye(experts)
    for i in range(experts):
        for j in range(experts):
            lengths = np.linalg.norm(logits[:, i]) * np.linalg.norm(logits[:, j])
            if i != j:
                found[i, j] = logits[:, i] @ logits[:, j] / lengths
    return found


@PROPERTY
@given(parts=st.lists(st.integers(1, 20), min_size=1, max_size=6), **LAYERS)
def test_cosine_from_a_streamed_gram_equals_cosine_of_stored_logits(
    parts: list[int], experts: int, seed: int
) -> None:
    logits = logits_of(experts, seed, sum(parts))
    gram = np.zeros((experts, experts))
    for batch in np.split(logits, np.cumsum(parts)[:-1]):
        gram += batch.T @ batch

    np.testing.assert_allclose(router_cosine(gram), slow_cosine(logits), rtol=0, atol=1e-9)


@PROPERTY
@given(**LAYERS)
def test_the_cosine_matrix_is_symmetric_with_unit_diagonal(experts: int, seed: int) -> None:
    logits = logits_of(experts, seed)

    cosine = router_cosine(logits.T @ logits)

    assert np.array_equal(cosine, cosine.T)
    assert np.array_equal(np.diag(cosine), np.ones(experts))
    assert np.abs(cosine).max() <= 1


@PROPERTY
@given(scale=st.floats(1e-3, 1e3), column=st.integers(0, 8), **LAYERS)
def test_rescaling_one_experts_logits_changes_no_cosine(
    scale: float, column: int, experts: int, seed: int
) -> None:
    logits = logits_of(experts, seed)
    scaled = logits.copy()
    scaled[:, column % experts] *= scale

    found = router_cosine(scaled.T @ scaled)

    np.testing.assert_allclose(found, router_cosine(logits.T @ logits), rtol=0, atol=1e-9)


def test_logits_of_zero_are_similar_to_nothing_but_themselves() -> None:
    cosine = router_cosine(np.diag([4.0, 0.0, 1.0]))

    assert np.array_equal(cosine, np.eye(3))


@PROPERTY
@given(data=st.data(), **LAYERS)
def test_dominant_experts_lead_their_own_groups(
    data: st.DataObject, experts: int, seed: int
) -> None:
    kept = data.draw(st.integers(1, experts))
    statistics = statistics_of(0, counts_of(experts, seed), logits_of(experts, seed))

    decision = group_layer(statistics, kept)

    dominant = sorted(int(e) for e in by_rank(statistics.frequency)[:kept])
    assert list(decision.representatives) == dominant
    assert [decision.group[e] for e in dominant] == list(range(kept))


@PROPERTY
@given(data=st.data(), **LAYERS)
def test_every_other_expert_joins_the_most_similar_dominant_one(
    data: st.DataObject, experts: int, seed: int
) -> None:
    kept, logits = data.draw(st.integers(1, experts)), logits_of(experts, seed)

    decision = group_layer(statistics_of(0, counts_of(experts, seed), logits), kept)

    cosine = slow_cosine(logits)
    for expert, group in enumerate(decision.group):
        assert group is not None
        if expert not in decision.representatives:
            chosen = cosine[expert, decision.representatives[group]]
            assert chosen == pytest.approx(max(cosine[expert, list(decision.representatives)]))


def test_a_dominant_expert_is_not_drawn_to_its_twin() -> None:
    logits = np.repeat(logits_of(1, 0), 3, axis=1)

    decision = group_layer(statistics_of(0, [3, 5, 4], logits), 2)

    assert decision.representatives == (1, 2)
    assert decision.group == (0, 0, 1)


@PROPERTY
@given(data=st.data(), **LAYERS)
def test_relabelling_experts_relabels_the_groups(
    data: st.DataObject, experts: int, seed: int
) -> None:
    kept, logits = data.draw(st.integers(1, experts)), logits_of(experts, seed)
    counts, order = counts_of(experts, seed), random_permutation(experts, seed).tolist()

    original = group_layer(statistics_of(0, counts, logits), kept)
    renamed = group_layer(statistics_of(0, [counts[e] for e in order], logits[:, order]), kept)

    expected = {frozenset(members) for members in original.members}
    assert {frozenset(order[e] for e in members) for members in renamed.members} == expected
    assert {order[e] for e in renamed.representatives} == set(original.representatives)


def test_merge_weights_are_the_row_normalised_frequencies() -> None:
    decision = group_layer(statistics_of(0, [1, 2, 5]), 2)

    assert decision.weight == (0.125, 0.25, 0.625)


def skewed_and_flat() -> list[LayerStatistics]:
    return [statistics_of(0, [97, 1, 1, 1]), statistics_of(1, [25, 25, 25, 25])]


def test_the_global_scope_gives_layers_their_own_numbers() -> None:
    config = McSmoe(scope="global", budget=Budget(keep_ratio=0.625))

    found = decide(config, skewed_and_flat(), 5)

    assert [len(each.representatives) for each in found] == [1, 4]


def test_the_uniform_scope_gives_layers_the_same_number() -> None:
    found = decide(McSmoe(scope="uniform"), skewed_and_flat(), 5)

    assert [len(each.representatives) for each in found] == [2, 2]


def test_the_global_scope_honours_the_minimum_per_layer() -> None:
    found = decide(McSmoe(scope="global", min_per_layer=2), skewed_and_flat(), 5)

    assert [len(each.representatives) for each in found] == [2, 3]


def test_layers_with_different_token_counts_are_compared_by_share() -> None:
    short = statistics_of(0, [4, 4, 1, 1])
    long = statistics_of(1, [400, 300, 200, 100])

    found = decide(McSmoe(scope="global"), [short, long], 4)

    assert [len(each.representatives) for each in found] == [2, 2]


def test_the_paper_preset_is_global_and_loses_ties_as_the_papers_code_does() -> None:
    """Its printed budget: what exceeds the value behind the first `total`, the best counting 1."""
    flat = [statistics_of(layer, [25, 25, 25, 25]) for layer in range(2)]

    paper, safe = (
        decide(McSmoe(preset=preset, scope="global"), flat, 4) for preset in ("paper", "safe")
    )

    assert [len(each.representatives) for each in paper] == [1, 1]
    assert [len(each.representatives) for each in safe] == [3, 1]


def test_a_flat_layer_collapses_beside_a_skewed_one_under_the_paper_preset() -> None:
    layers = [statistics_of(0, [25] * 8), statistics_of(1, [90, 40, 30, 28, 6, 3, 2, 1])]

    found = decide(McSmoe(preset="paper"), layers, 8)

    # Shares: eight of 1/8, and .45 .2 .15 .14 .03 ...; the value behind the first 8 is 1/8.
    assert [len(each.representatives) for each in found] == [1, 4]


@PROPERTY
@given(seed=st.integers(0, 999), data=st.data())
def test_without_ties_both_presets_agree(seed: int, data: st.DataObject) -> None:
    layers = [statistics_of(layer, counts_of(6, seed + layer)) for layer in range(3)]
    everything = np.concatenate([each.frequency for each in layers])
    total = data.draw(st.integers(3, 18))
    assume(len(set(everything.tolist())) == 18)

    paper, safe = (
        decide(McSmoe(preset=preset, scope="global"), layers, total) for preset in ("paper", "safe")
    )

    assert paper == safe


def test_the_paper_preset_survives_being_written_down_and_refuses_other_scopes() -> None:
    preset = McSmoe(preset="paper")

    assert McSmoe.model_validate(preset.model_dump()) == preset
    assert preset.uneven
    for changed in ({"scope": "uniform"}, {"min_per_layer": 2}):
        with pytest.raises(ValidationError, match="preset=paper has scope=global"):
            McSmoe.model_validate({"preset": "paper", **changed})
