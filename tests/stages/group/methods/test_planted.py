"""Layers with known structure: copies of a few experts, or experts that nobody needs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from stages.calibrate.statistics import LayerStatistics
from stages.errors import BudgetError
from stages.group.config import (
    AnyMethod,
    Ean,
    HcSmoe,
    McSmoe,
    MergeMoe,
    Msan,
    Naee,
    Random,
    Ream,
    Reap,
    Stun,
    Uncurl,
)
from stages.group.methods import DECIDE
from stages.group.methods.hc_smoe import output_distance
from stages.group.methods.naee import best_subset
from stages.group.methods.ream import similarity
from stages.group.methods.scores import saliency
from tests.stages.group.observed import (
    label,
    observed_layer,
    partition,
    random_layer,
    random_tokens,
)
from tests.tiny import statistics_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Copies:
    """E experts that are near copies of D, in random order, one of each D more popular."""

    logits: Array
    outputs: Array
    labels: Array

    @property
    def statistics(self) -> LayerStatistics:
        return observed_layer(self.logits, self.outputs)

    @property
    def partition(self) -> set[frozenset[int]]:
        return {frozenset(np.flatnonzero(self.labels == c).tolist()) for c in set(self.labels)}


def copies(experts: int, distinct: int, seed: int, tokens: int = 240) -> Copies:
    generator = np.random.default_rng(seed)
    labels = np.arange(experts) % distinct
    logits = 2 * generator.normal(size=(tokens, distinct))[:, labels]
    logits += 0.1 * generator.normal(size=logits.shape)
    logits[:, :distinct] += 0.3
    outputs = generator.normal(size=(1, distinct, 6)) + generator.normal(size=(tokens, distinct, 6))
    outputs = outputs[:, labels] + 0.05 * generator.normal(size=(tokens, experts, 6))
    order = generator.permutation(experts)
    return Copies(logits[:, order], outputs[:, order], labels[order])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "config",
    [
        McSmoe(),
        Uncurl(),
        HcSmoe(),
        HcSmoe(linkage="single"),
        MergeMoe(),
        Stun(others="merge", coactivation=0.0),
    ],
    ids=label,
)
def test_copies_are_merged_with_their_likes(config: AnyMethod, seed: int) -> None:
    layer = copies(12, 4, seed)

    (found,) = DECIDE[config.method](config, [layer.statistics], 4)

    assert partition(found.group) == layer.partition


@pytest.mark.parametrize("seed", range(3))
def test_ream_gathers_copies_around_the_loudest(seed: int) -> None:
    layer = copies(12, 4, seed)
    loudest = [int(np.flatnonzero(layer.labels == label)[0]) for label in range(4)]
    layer.outputs[:, loudest] *= 5

    (found,) = DECIDE["ream"](Ream(), [layer.statistics], 4)

    assert partition(found.group) == layer.partition
    assert set(found.representatives) == set(loudest)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", [Naee(), Stun(coactivation=0.0)], ids=label)
def test_one_of_each_kind_is_kept(config: AnyMethod, seed: int) -> None:
    layer = copies(12, 4, seed)

    (found,) = DECIDE[config.method](config, [layer.statistics], 4)

    assert sorted(layer.labels[list(found.representatives)].tolist()) == [0, 1, 2, 3]


def test_chance_does_not_find_copies() -> None:
    layer = copies(12, 4, 0)

    found = [
        DECIDE["random"](Random(seed=seed, others="merge"), [layer.statistics], 4)[0]
        for seed in range(20)
    ]

    assert all(partition(each.group) != layer.partition for each in found)
    assert len({each.group for each in found}) > 15


def test_chance_keeps_every_expert_now_and_then() -> None:
    kept = [
        DECIDE["random"](Random(seed=seed), [random_layer(6, 0)], 2)[0].representatives
        for seed in range(200)
    ]

    counts = np.bincount(np.array(kept).reshape(-1), minlength=6)
    assert counts.min() > 40  # 66.7 expected; 40 lies 4 standard deviations below


@pytest.mark.parametrize("config", [Reap(), Ean(), Ean(mean=True), Msan(), Naee()], ids=label)
def test_experts_that_put_out_nothing_are_dropped_however_often_they_are_chosen(
    config: AnyMethod,
) -> None:
    _, outputs = random_tokens(8, 3, tokens=200)
    logits = np.random.default_rng(0).normal(size=(200, 8))
    idle = [1, 4, 6]
    logits[:, idle] += 1
    outputs[:, idle] *= 1e-3

    (found,) = DECIDE[config.method](config, [observed_layer(logits, outputs)], 6)

    # One of the idle ones must stay to make six; the others are its equals.
    dropped = {expert for expert, group in enumerate(found.group) if group is None}
    assert dropped < set(idle)


def scored(selected: list[int], norm: list[float], gate: list[float]) -> LayerStatistics:
    """Every token of an expert has the same norm and gate."""
    layer = statistics_of(0, selected)
    counts, norms, gates = (np.array(each, float) for each in (selected, norm, gate))
    layer.sums["norm"] = counts * norms
    layer.sums["norm_sq"] = counts * norms**2
    layer.sums["gate_norm"] = counts * gates * norms
    return layer


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (Reap(), (0, 3)),  # gate x norm: 4, 3, 1, 5
        (Ean(), (0, 1)),  # tokens x norm: 80, 90, 20, 50
        (Ean(mean=True), (0, 3)),  # norm: 8, 3, 2, 10
        (Msan(), (0, 3)),
        (Msan(squared=False), (0, 3)),
    ],
    ids=label,
)
def test_scores_are_the_published_ones(config: AnyMethod, kept: tuple[int, ...]) -> None:
    layer = scored([10, 30, 10, 5], [8, 3, 2, 10], [0.5, 1.0, 0.5, 0.5])

    (found,) = DECIDE[config.method](config, [layer], 2)

    assert found.representatives == kept


def test_squares_prefer_rare_outbursts_to_a_steady_hum() -> None:
    layer = statistics_of(0, [10, 10])
    layer.sums["norm"] = np.array([20.0, 12.0])
    layer.sums["norm_sq"] = np.array([40.0, 104.0])  # nine norms of 2/9, and one of 10

    (squares,) = DECIDE["msan"](Msan(), [layer], 1)
    (means,) = DECIDE["msan"](Msan(squared=False), [layer], 1)

    assert (squares.representatives, means.representatives) == ((1,), (0,))


def test_mean_outputs_are_compared_over_all_tokens_not_only_routed_ones() -> None:
    logits, outputs = random_tokens(5, 0)
    mean = outputs.mean(axis=0)

    expected = np.linalg.norm(mean[:, None] - mean[None, :], axis=2)

    np.testing.assert_allclose(output_distance(observed_layer(logits, outputs)), expected)


def test_ream_similarity_equals_its_definition_on_stored_tokens() -> None:
    logits, outputs = random_tokens(5, 0)
    columns = logits / np.linalg.norm(logits, axis=0)
    distance = np.linalg.norm(columns.T[:, None] - columns.T[None, :], axis=2)
    gated = np.exp(logits)[:, :, None] * outputs
    units = gated / np.linalg.norm(gated, axis=2, keepdims=True)
    cosine = np.einsum("tih,tjh->tij", units, units)

    expected = ((1 - distance / distance.max()) + (0.5 * (cosine + 1)).mean(axis=0)) / 2

    found = similarity(observed_layer(logits, outputs))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_ream_lets_the_most_salient_centres_fill_up_first() -> None:
    layer = random_layer(9, 4)
    by_saliency = np.argsort(-saliency(layer)).tolist()

    (found,) = DECIDE["ream"](Ream(group_size=4), [layer], 4)

    sizes = {r: len(m) for r, m in zip(found.representatives, found.members, strict=True)}
    assert [sizes[centre] for centre in by_saliency[:4]] == [4, 3, 1, 1]
    assert found.weight == tuple(saliency(layer).tolist())


def test_ream_refuses_groups_that_cannot_hold_all_experts() -> None:
    with pytest.raises(BudgetError, match="3 groups of 2 cannot hold 9 experts"):
        DECIDE["ream"](Ream(group_size=2), [random_layer(9, 0)], 3)


def replaced_error(logits: Array, outputs: Array, subset: tuple[int, ...]) -> float:
    """Each dropped expert's gated outputs replaced by those of its one best stand-in."""
    top = np.argsort(-logits, axis=1)[:, :2]
    scores = np.take_along_axis(logits, top, axis=1)
    gates = np.exp(scores - scores.max(axis=1, keepdims=True))
    gates /= gates.sum(axis=1, keepdims=True)
    error = 0.0
    for expert in set(range(logits.shape[1])) - set(subset):
        rows, place = np.nonzero(top == expert)
        gate = gates[rows, place]
        error += min(
            float((gate**2 * ((outputs[rows, expert] - outputs[rows, j]) ** 2).sum(1)).sum())
            for j in subset
        )
    return error


@pytest.mark.parametrize("seed", range(5))
def test_naee_finds_the_best_subset_by_evaluating_every_token(seed: int) -> None:
    logits, outputs = random_tokens(6, seed)

    best = min(combinations(range(6), 3), key=lambda s: replaced_error(logits, outputs, s))

    assert tuple(best_subset(Naee(), observed_layer(logits, outputs), 3)) == best


def test_naee_refuses_what_it_cannot_try() -> None:
    with pytest.raises(BudgetError, match=r"8 of 17 experts can be chosen in 24,310 ways"):
        DECIDE["naee"](Naee(), [random_layer(17, 0)], 8)


def test_stun_takes_what_is_used_together_for_alike() -> None:
    """Rows 1 and 2 are equal, 0 is near; but 0 and 1 are chosen together."""
    layer = random_layer(4, 0)
    assert layer.router is not None
    layer.router[:] = 0
    layer.router[:, 0] = [1.0, 1.1, 1.1, 9.0]
    layer.sums["co_selected"][:] = np.diag([5, 5, 5, 5])
    layer.sums["co_selected"][0, 1] = layer.sums["co_selected"][1, 0] = 50

    joined, rows = (
        DECIDE["stun"](Stun(others="merge", coactivation=weight), [layer], 3)[0]
        for weight in (1.0, 0.0)
    )

    assert frozenset({0, 1}) in partition(joined.group)
    assert frozenset({1, 2}) in partition(rows.group)
