"""Exactly K clusters, the best that small cases allow."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.group.clusters import agglomerate, k_means, squared_distances
from tests.tiny import PROPERTY

POINTS = {"count": st.integers(1, 8), "seed": st.integers(0, 999), "data": st.data()}


def spread(points: np.ndarray, labels: np.ndarray) -> float:
    return sum(
        float(((points[labels == c] - points[labels == c].mean(axis=0)) ** 2).sum())
        for c in set(labels.tolist())
    )


@PROPERTY
@given(distinct=st.integers(1, 8), **POINTS)
def test_no_cluster_is_ever_empty_not_even_with_equal_points(
    distinct: int, count: int, seed: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(distinct, 3))[generator.integers(distinct, size=count)]
    clusters = data.draw(st.integers(1, count))

    labels = k_means(points, clusters, seed=0, starts=2)

    assert set(labels.tolist()) == set(range(clusters))


@pytest.mark.parametrize("seed", range(8))
def test_small_cases_equal_brute_force(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(7, 2))
    every = (np.array(labels) for labels in product(range(3), repeat=7))
    best = min(spread(points, labels) for labels in every if len(set(labels.tolist())) == 3)

    found = spread(points, k_means(points, 3, seed=0, starts=20))

    assert found == pytest.approx(best, rel=1e-9)


def test_more_starts_are_never_worse() -> None:
    points = np.random.default_rng(0).normal(size=(60, 2))

    found = [spread(points, k_means(points, 12, seed=3, starts=n)) for n in (1, 4, 16)]

    assert found[0] >= found[1] >= found[2]
    assert found[0] > found[2]


@PROPERTY
@given(linkage=st.sampled_from(["average", "single", "complete"]), shift=st.floats(-9, 9), **POINTS)
def test_agglomeration_gives_exactly_k_whatever_is_added_to_all_distances(
    linkage: str, shift: float, count: int, seed: int, data: st.DataObject
) -> None:
    count += 1
    points = np.random.default_rng(seed).normal(size=(count, 3))
    distance = squared_distances(points @ points.T)
    clusters = data.draw(st.integers(1, count))

    found = agglomerate(distance, clusters, linkage)

    assert len(set(found.tolist())) == clusters
    assert np.array_equal(agglomerate(distance + shift, clusters, linkage), found)


def test_linkages_differ_on_a_chain() -> None:
    chain = np.array([0.0, 1.0, 2.1, 3.3, 4.6])
    distance = np.abs(chain[:, None] - chain[None, :])

    single = agglomerate(distance, 2, "single").tolist()
    complete = agglomerate(distance, 2, "complete").tolist()

    assert single == [0, 0, 0, 0, 1]
    assert complete == [0, 0, 1, 1, 1]


def test_squared_distances_from_inner_products() -> None:
    points = np.random.default_rng(0).normal(size=(6, 4))

    expected = ((points[:, None] - points[None, :]) ** 2).sum(axis=2)

    np.testing.assert_allclose(squared_distances(points @ points.T), expected, atol=1e-12)
