"""How much each member counts: frequencies, saliencies, or what costs least."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.calibrate.statistics import LayerStatistics
from stages.errors import StatisticsError
from stages.group.decision import from_labels
from stages.group.methods.scores import saliency
from stages.merge.config import MergeConfig
from stages.merge.weights import alpha, with_weights
from tests.stages.group.observed import observed_layer, random_layer, random_tokens
from tests.tiny import PROPERTY

Array = np.ndarray[Any, Any]
SEEDS = st.integers(0, 999)


def dense_gates(logits: Array) -> Array:
    """[T, E] gates of softmax over the top 2."""
    top = np.argsort(-logits, axis=1)[:, :2]
    scores = np.exp(np.take_along_axis(logits, top, axis=1))
    gates = np.zeros_like(logits)
    np.put_along_axis(gates, top, scores / scores.sum(axis=1, keepdims=True), axis=1)
    return gates


def merge_error(logits: Array, outputs: Array, pair: list[int], weight: float) -> float:
    """Sum over tokens: both experts against their average under both gates."""
    gates, values = dense_gates(logits)[:, pair], outputs[:, pair]
    exact = (gates[:, :, None] * values).sum(axis=1)
    average = weight * values[:, 0] + (1 - weight) * values[:, 1]
    return float(((exact - gates.sum(axis=1)[:, None] * average) ** 2).sum())


@PROPERTY
@given(experts=st.integers(2, 6), seed=SEEDS)
def test_a_pairs_weight_costs_least_on_the_tokens(experts: int, seed: int) -> None:
    logits, outputs = random_tokens(experts, seed)
    decision = from_labels(0, [0, 0, *range(2, experts)], [1.0] * experts)
    (found,) = with_weights(
        [decision], [observed_layer(logits, outputs)], MergeConfig(weights="alpha")
    )

    cost = merge_error(logits, outputs, [0, 1], found.weight[0])

    assert found.weight[0] + found.weight[1] == pytest.approx(1)
    others = [merge_error(logits, outputs, [0, 1], w) for w in np.linspace(0, 1, 21)]
    assert cost <= min(others) * (1 + 1e-9)


def test_members_of_larger_groups_count_by_what_their_tokens_would_lose() -> None:
    """Three unlike experts; the last is never used."""
    logits, outputs = random_tokens(3, 1)
    logits[:, 2] = -100
    logits[:, 0] += 5
    layer = observed_layer(logits, outputs)
    assert layer.subsample is not None

    found = alpha(
        from_labels(0, [0, 0, 0], [1.0] * 3), layer.subsample["swap"], layer.subsample["both"]
    )

    assert found.sum() == pytest.approx(1)
    assert found[0] > 0.9
    assert found[2] < 1e-9


@PROPERTY
@given(size=st.integers(2, 6), seed=SEEDS)
def test_weights_of_a_group_are_shares_and_follow_their_experts(size: int, seed: int) -> None:
    logits, outputs = random_tokens(size, seed)
    order = np.random.default_rng(seed).permutation(size)
    decision = from_labels(0, [0] * size, [1.0] * size)
    weights = []
    for ids in (np.arange(size), order):
        sums = observed_layer(logits[:, ids], outputs[:, ids]).subsample
        assert sums is not None
        weights.append(alpha(decision, sums["swap"], sums["both"]))

    assert weights[0].min() >= 0
    assert weights[0].sum() == pytest.approx(1)
    np.testing.assert_allclose(weights[1], weights[0][order], rtol=1e-6, atol=1e-9)


def test_equal_members_count_alike() -> None:
    zeros = np.zeros((3, 3))

    assert alpha(from_labels(0, [0, 0, 0], [1.0] * 3), zeros, zeros).tolist() == [1 / 3] * 3


def test_each_choice_gives_its_weights_and_no_other_group() -> None:
    layer = random_layer(5, 2)
    decision = from_labels(0, [0, 0, 2, None, 2], [5.0, 4.0, 3.0, 2.0, 1.0])

    found = {
        name: with_weights([decision], [layer], MergeConfig(weights=name))[0]
        for name in ("method", "frequency", "saliency", "uniform", "alpha")
    }

    assert found["method"] == decision
    assert found["frequency"].weight == tuple(layer.frequency)
    assert found["saliency"].weight == tuple(saliency(layer))
    assert found["uniform"].weight == (1.0,) * 5
    assert {each.group for each in found.values()} == {decision.group}
    assert {each.representatives for each in found.values()} == {decision.representatives}


def test_alpha_needs_a_sample_only_where_something_is_merged() -> None:
    full = random_layer(3, 0)
    bare = LayerStatistics(full.layer, full.sums)
    asked = MergeConfig(weights="alpha")

    pruned = from_labels(0, [0, None, 2], [1.0] * 3)
    assert with_weights([pruned], [bare], asked)[0].group == pruned.group
    with pytest.raises(StatisticsError, match="outputs of all experts on sampled"):
        with_weights([from_labels(0, [0, 0, 2], [1.0] * 3)], [bare], asked)
