"""Exactly K clusters, none of them empty, the same ones every time."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Lloyd's algorithm on a few hundred points has settled long before.
_STEPS = 50


def k_means(points: Array, count: int, *, seed: int, starts: int) -> Array:
    """[N] labels 0 to count-1 of the start with the least sum of squared distances.

    Starts are drawn as in k-means++ (far points are likely), by a seeded generator.

    Args:
        points: [N, D], N >= count.
    """
    generator = np.random.default_rng(seed)
    best, least = np.zeros(len(points), np.int64), np.inf
    for _ in range(starts):
        labels = _lloyd(points, _spread_out(points, count, generator))
        labels = _without_empty(points, labels, count)
        error = float(_to_own_centre(points, labels, count).sum())
        if error < least - 1e-12:
            best, least = labels, error
    return best


def agglomerate(distance: Array, count: int, linkage: str) -> Array:
    """[N] labels of exactly `count` clusters from joining the nearest two again and again.

    Args:
        distance: [N, N], symmetric; may be negative, because for these linkages a constant added
            to all pairs changes nothing.
        linkage: `average`, `single` or `complete`.
    """
    from scipy.cluster.hierarchy import cut_tree
    from scipy.cluster.hierarchy import linkage as tree
    from scipy.spatial.distance import squareform

    condensed = squareform((distance + distance.T) / 2, checks=False)
    joined = tree(condensed - condensed.min(), linkage)
    return np.asarray(cut_tree(joined, n_clusters=count)[:, 0])


def squared_distances(gram: Array) -> Array:
    """[N, N] squared distances of vectors from their inner products; zeros on the diagonal."""
    squares = np.diag(gram)
    found = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(found, 0.0)
    return np.asarray(found)


def _spread_out(points: Array, count: int, generator: np.random.Generator) -> Array:
    """[count, D] starting centres: each drawn in proportion to its distance from those before."""
    chosen = [int(generator.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        total = nearest.sum()
        share = nearest / total if total > 0 else np.full(len(points), 1 / len(points))
        chosen.append(int(generator.choice(len(points), p=share)))
    return points[chosen]


def _lloyd(points: Array, centres: Array) -> Array:
    """[N] labels after at most `_STEPS` steps; a centre that lost its points stays where it is."""
    labels = np.full(len(points), -1)
    for _ in range(_STEPS):
        found = _distances(points, centres).argmin(axis=1)
        if (found == labels).all():
            break
        labels = found
        for cluster in np.unique(labels):
            centres[cluster] = points[labels == cluster].mean(axis=0)
    return labels


def _without_empty(points: Array, labels: Array, count: int) -> Array:
    """Each empty cluster takes the point that lies farthest from its own centre."""
    labels = labels.copy()
    for cluster in range(count):
        sizes = np.bincount(labels, minlength=count)
        if sizes[cluster]:
            continue
        distance = _to_own_centre(points, labels, count)
        distance[sizes[labels] == 1] = -1.0
        labels[np.argmax(distance)] = cluster
    return labels


def _to_own_centre(points: Array, labels: Array, count: int) -> Array:
    centres = np.zeros((count, points.shape[1]))
    for cluster in np.unique(labels):
        centres[cluster] = points[labels == cluster].mean(axis=0)
    return np.asarray(((points - centres[labels]) ** 2).sum(axis=1))


def _distances(points: Array, centres: Array) -> Array:
    """[N, K] squared distances, less what all centres share (the norm of the point)."""
    return np.asarray((centres**2).sum(axis=1) - 2 * points @ centres.T)
