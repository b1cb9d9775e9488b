"""Predicted errors against the outputs themselves, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.group.decision import LayerDecision, from_labels
from stages.group.predict import expert_errors, predicted_error, width_curve
from stages.subsample.columns import Sums, empty_sums
from stages.subsample.pairs import chunk_sums, pair_errors
from tests.tiny import PROPERTY

Array = np.ndarray[Any, Any]
EXPERTS, HIDDEN, TOKENS = 6, 4, 40
SEEDS = st.integers(0, 9999)


def drawn(seed: int, top_k: int = 2) -> tuple[Array, Array, Sums]:
    """Outputs [T, E, H], gates [T, E] and the sums that a run makes of them."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(TOKENS, EXPERTS, HIDDEN, generator=generator).double()
    outputs *= torch.rand(EXPERTS, 1, generator=generator) + 0.2
    gates, ids = torch.rand(TOKENS, EXPERTS, generator=generator).double().topk(top_k)
    sums = empty_sums(EXPERTS, HIDDEN, 3)
    for name, value in chunk_sums(outputs, ids, gates).items():
        sums[name] += value.numpy()
    dense = torch.zeros(TOKENS, EXPERTS).double().scatter(1, ids, gates)
    return outputs.numpy(), dense.numpy(), sums


def replaced(outputs: Array, decision: LayerDecision) -> Array:
    """[T, E, H] what stands in for every expert: nothing, or its group's weighted mean."""
    found = np.zeros_like(outputs)
    for members in decision.members:
        weights = np.array([decision.weight[e] for e in members])
        mean = np.einsum("m,tmh->th", weights / weights.sum(), outputs[:, list(members)])
        found[:, list(members)] = mean[:, None]
    return found


def layer_error(outputs: Array, gates: Array, decision: LayerDecision) -> float:
    """The slow way: both outputs of the layer for every token."""
    before = np.einsum("te,teh->th", gates, outputs)
    after = np.einsum("te,teh->th", gates, replaced(outputs, decision))
    return float(((before - after) ** 2).sum() / (before**2).sum())


def decision(labels: list[int | None], seed: int) -> LayerDecision:
    weight = np.random.default_rng(seed).uniform(0.1, 1, EXPERTS)
    return from_labels(0, labels, weight.tolist())


@PROPERTY
@given(seed=SEEDS, gone=st.sets(st.integers(0, EXPERTS - 1), max_size=EXPERTS - 1))
def test_dropping_any_number_of_experts_is_exact(seed: int, gone: set[int]) -> None:
    outputs, gates, sums = drawn(seed)
    chosen = decision([None if e in gone else e for e in range(EXPERTS)], seed)
    expected = layer_error(outputs, gates, chosen)
    np.testing.assert_allclose(predicted_error(sums, chosen), expected, rtol=1e-9, atol=1e-12)


@PROPERTY
@given(seed=SEEDS, top_k=st.integers(1, 3), pair=st.permutations(range(EXPERTS)))
def test_one_pair_is_exact_at_any_weights(seed: int, top_k: int, pair: list[int]) -> None:
    outputs, gates, sums = drawn(seed, top_k)
    labels: list[int | None] = list(range(EXPERTS))
    labels[pair[0]] = pair[1]
    chosen = decision(labels, seed)
    expected = layer_error(outputs, gates, chosen)
    np.testing.assert_allclose(predicted_error(sums, chosen), expected, rtol=1e-8, atol=1e-12)


@PROPERTY
@given(seed=SEEDS)
def test_a_pair_at_its_best_weight_costs_what_its_sums_say(seed: int) -> None:
    _, _, sums = drawn(seed)
    errors, energy = pair_errors(sums["swap"], sums["both"]), sums["gated_gram"].sum()
    share = float(errors.weight[1, 4])
    labels: list[int | None] = [0, 1, 2, 3, 1, 5]
    merged = from_labels(0, labels, [1, share, 1, 1, 1 - share, 1])
    remapped = from_labels(0, labels, [1, 1, 1, 1, 0, 1])
    assert predicted_error(sums, merged) == pytest.approx(errors.merge[1, 4] / energy)
    assert predicted_error(sums, remapped) == pytest.approx(errors.remap[1, 4] / energy)
    assert predicted_error(sums, merged) <= predicted_error(sums, remapped) + 1e-12


@PROPERTY
@given(seed=SEEDS, labels=st.lists(st.sampled_from([0, 1, None]), min_size=6, max_size=6))
def test_errors_are_finite_and_their_parts_add_up(seed: int, labels: list[int | None]) -> None:
    _, _, sums = drawn(seed)
    labels[0], labels[1] = 0, 1
    chosen = decision(labels, seed)
    parts = expert_errors(sums, chosen)
    assert np.isfinite(parts).all() and parts.sum() == predicted_error(sums, chosen) >= -1e-12
    whole = decision(list(range(EXPERTS)), seed)
    assert predicted_error(sums, whole) == 0


@pytest.mark.parametrize("labels", [[0, 0, 0, 3, 4, 5], [0, 0, 0, 0, 4, 5], [0] * 6])
def test_large_groups_are_near_the_truth_where_gates_do_not_follow_distances(
    labels: list[int | None],
) -> None:
    ratios = []
    for seed in range(20):
        outputs, gates, sums = drawn(seed)
        chosen = decision(labels, seed)
        ratios.append(predicted_error(sums, chosen) / layer_error(outputs, gates, chosen))
    assert 0.95 < float(np.mean(ratios)) < 1.05
    assert min(ratios) > 0.75 and max(ratios) < 1.3


@PROPERTY
@given(seed=SEEDS)
def test_experts_that_are_the_same_cost_nothing_to_merge(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(TOKENS, 1, HIDDEN, generator=generator).double()
    gates, ids = torch.rand(TOKENS, EXPERTS, generator=generator).double().topk(2)
    made = chunk_sums(outputs.expand(-1, EXPERTS, -1), ids, gates)
    sums = {name: value.numpy() for name, value in made.items()}
    assert abs(predicted_error(sums, decision([0] * EXPERTS, seed))) < 1e-12


def test_narrower_experts_lose_their_neurons_of_least_energy() -> None:
    _, _, sums = drawn(0)
    sums["neuron_output"][:] = [3.0, 1.0, 2.0]
    whole = decision(list(range(EXPERTS)), 0)
    narrow = LayerDecision(0, whole.group, whole.representatives, whole.weight, width=2)
    energy = sums["gated_gram"].sum()

    assert predicted_error(sums, narrow) == pytest.approx(EXPERTS * 1.0 / energy)
    assert width_curve(sums)[0].tolist() == [6, 3, 1, 0]


def test_a_layer_without_output_has_no_error() -> None:
    sums = empty_sums(EXPERTS, HIDDEN, 3)
    assert predicted_error(sums, decision([0, 0, None, 3, 4, 5], 0)) == 0
