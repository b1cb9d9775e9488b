"""UNCURL: exactly D clusters of experts whose router logits rise and fall together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.group.budget import Sizes
from stages.group.config import Budget, Frequency, McSmoe, Uncurl
from stages.group.methods import mc_smoe
from stages.group.methods.uncurl import affinity, decide, embedding
from stages.group.stage import decide as decide_all
from tests.stages.group.observed import partition, random_layer
from tests.tiny import PROPERTY, statistics_of

Array = np.ndarray[Any, Any]
LAYERS = {"experts": st.integers(1, 9), "seed": st.integers(0, 999)}
SIZES = Sizes(fixed=0, per_expert=1, layers=3)


def logits_of(experts: int, seed: int, tokens: int = 40) -> Array:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(tokens, experts)) + generator.normal(size=experts)


def planted(experts: int, clusters: int, seed: int, noise: float = 0.05) -> tuple[Array, Array]:
    """Router columns that are prototypes and a little noise: logits [T, E], labels [E]."""
    generator = np.random.default_rng(seed)
    hidden = 2 * clusters
    labels = generator.permutation(np.arange(experts) % clusters)
    columns = generator.normal(size=(hidden, clusters))[:, labels]
    columns += noise * generator.normal(size=columns.shape)
    return generator.normal(size=(4 * hidden, hidden)) @ columns, labels


def true_partition(labels: Array) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}


@pytest.mark.parametrize(("experts", "clusters"), [(8, 4), (32, 8), (128, 64)])
@pytest.mark.parametrize(
    "config",
    [Uncurl(), Uncurl(center_logits="token"), Uncurl(zero_diagonal=True)],
    ids=["plain", "centred", "zeros"],
)
@pytest.mark.parametrize("seed", range(3))
def test_planted_clusters_are_found(config: Uncurl, experts: int, clusters: int, seed: int) -> None:
    logits, labels = planted(experts, clusters, seed)

    (found,) = decide(config, [statistics_of(0, [1] * experts, logits)], clusters)

    assert partition(found.group) == true_partition(labels)


def test_clusters_merge_around_their_most_frequent_expert() -> None:
    logits, labels = planted(12, 3, 0)
    counts = np.random.default_rng(1).permutation(12) + 1

    (found,) = decide(Uncurl(), [statistics_of(0, counts.tolist(), logits)], 3)

    expected = {max(members, key=lambda e: counts[e]) for members in true_partition(labels)}
    assert set(found.representatives) == expected
    assert found.weight == tuple(counts / counts.sum())


@PROPERTY
@given(parts=st.lists(st.integers(1, 20), min_size=1, max_size=6), **LAYERS)
def test_affinity_from_streamed_grams_equals_that_of_stored_logits(
    parts: list[int], experts: int, seed: int
) -> None:
    logits = logits_of(experts, seed, sum(parts))
    gram = np.zeros((experts, experts))
    for batch in np.split(logits, np.cumsum(parts)[:-1]):
        gram += batch.T @ batch

    columns = logits / np.linalg.norm(logits, axis=0)

    np.testing.assert_allclose(affinity(gram), (1 + columns.T @ columns) / 2, rtol=0, atol=1e-9)


@PROPERTY
@given(centered=st.booleans(), **LAYERS)
def test_affinity_is_symmetric_with_ones_on_the_diagonal_and_within_0_and_1(
    centered: bool, experts: int, seed: int
) -> None:
    logits = logits_of(experts, seed)

    found = affinity(logits.T @ logits, centered)

    assert np.array_equal(found, found.T)
    assert np.array_equal(np.diag(found), np.ones(experts))
    assert found.min() >= 0
    assert found.max() <= 1


@PROPERTY
@given(scale=st.floats(1e-3, 1e3), column=st.integers(0, 8), **LAYERS)
def test_the_scale_of_one_experts_logits_does_not_matter(
    scale: float, column: int, experts: int, seed: int
) -> None:
    logits = logits_of(experts, seed)
    scaled = logits.copy()
    scaled[:, column % experts] *= scale

    found = affinity(scaled.T @ scaled)

    np.testing.assert_allclose(found, affinity(logits.T @ logits), rtol=0, atol=1e-9)


@PROPERTY
@given(experts=st.integers(3, 9), seed=st.integers(0, 999))
def test_only_centred_logits_are_blind_to_what_softmax_is_blind_to(experts: int, seed: int) -> None:
    logits = logits_of(experts, seed)
    shifted = logits + 3 * np.random.default_rng(seed + 1).normal(size=(len(logits), 1))
    plain, moved = logits.T @ logits, shifted.T @ shifted

    np.testing.assert_allclose(affinity(moved, True), affinity(plain, True), rtol=0, atol=1e-9)
    assert np.abs(affinity(moved) - affinity(plain)).max() > 0.01


def test_centred_logits_show_clusters_through_a_large_common_shift() -> None:
    logits, labels = planted(16, 4, 0)
    shifted = logits + 1e3 * np.random.default_rng(1).normal(size=(len(logits), 1))

    (found,) = decide(Uncurl(center_logits="token"), [statistics_of(0, [1] * 16, shifted)], 4)

    assert partition(found.group) == true_partition(labels)


@PROPERTY
@given(zero=st.booleans(), data=st.data(), **LAYERS)
def test_rows_of_the_embedding_have_norm_one(
    zero: bool, data: st.DataObject, experts: int, seed: int
) -> None:
    logits = logits_of(experts, seed)
    count = data.draw(st.integers(1, experts))

    rows = embedding(affinity(logits.T @ logits), count, zero_diagonal=zero)

    norms = np.linalg.norm(rows, axis=1)
    assert rows.shape == (experts, count)
    assert all(norm == pytest.approx(1) or norm == 0 for norm in norms)


@PROPERTY
@given(data=st.data(), seed=st.integers(0, 99))
def test_every_layer_has_exactly_d_clusters_where_mc_smoe_keeps_only_the_sum(
    data: st.DataObject, seed: int
) -> None:
    kept = data.draw(st.integers(1, 6))
    layers = [random_layer(6, seed + layer, layer=layer) for layer in range(3)]
    budget = Budget(experts_per_layer=kept)

    uncurl = decide_all(Uncurl(budget=budget), layers, SIZES)
    adaptive = decide_all(McSmoe(scope="global", budget=budget), layers, SIZES)

    assert [len(each.representatives) for each in uncurl] == [kept] * 3
    assert sum(len(each.representatives) for each in adaptive) == 3 * kept


def test_the_papers_baselines_are_frequency_pruning_and_merging_into_the_most_frequent() -> None:
    layers = [random_layer(7, layer, layer=layer) for layer in range(3)]

    def found(config: Any) -> Any:
        return decide_all(
            config.model_copy(update={"budget": Budget(experts_per_layer=3)}), layers, SIZES
        )

    assert found(Uncurl(grouping="frequency_prune")) == found(Frequency())
    assert found(Uncurl(grouping="frequency_merge")) == found(McSmoe())
    for each, statistics in zip(found(Uncurl(grouping="frequency_merge")), layers, strict=True):
        top = sorted(np.argsort(-statistics.frequency)[:3].tolist())
        similarity = affinity(statistics.sums["logit_gram"])
        assert list(each.representatives) == top
        for expert, group in enumerate(each.group):
            if expert not in top:
                assert each.representatives[group] == max(top, key=lambda c: similarity[expert, c])


def test_the_first_layer_may_be_clustered_merged_by_frequency_or_skipped() -> None:
    layers = [random_layer(7, layer, layer=layer) for layer in (2, 3, 4)]
    budget = Budget(experts_per_layer=3)

    cluster, frequency, skip = (
        decide_all(Uncurl(first_layer=choice, budget=budget), layers, SIZES)
        for choice in ("cluster", "frequency", "skip")
    )

    assert frequency[0] == mc_smoe.group_layer(layers[0], 3) != cluster[0]
    assert skip[0].group == tuple(range(7))
    assert cluster[1:] == frequency[1:] == skip[1:]


def test_a_first_layer_that_is_skipped_anyway_makes_no_other_layer_the_first() -> None:
    layers = [random_layer(7, layer, layer=layer) for layer in (2, 3)]
    asked = Uncurl(budget=Budget(experts_per_layer=3), skip_layers=(2,))

    clustered = decide_all(asked, layers, SIZES)
    same = decide_all(asked.model_copy(update={"first_layer": "frequency"}), layers, SIZES)

    assert clustered == same


def test_another_seed_may_decide_otherwise_but_the_same_seed_never_does() -> None:
    layer = random_layer(24, 0, tokens=200)

    found = [decide(Uncurl(seed=seed, n_init=1), [layer], 9) for seed in (0, 0, 1, 2, 3)]

    assert found[0] == found[1]
    assert any(a != b for a, b in pairwise(found[1:]))
