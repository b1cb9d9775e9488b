"""Statistics of layers whose routing and outputs are made up, summed by the functions of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stages.calibrate.observer import Routed, add, empty_sums, layer_sums
from stages.calibrate.statistics import LayerStatistics
from stages.group.clusters import squared_distances
from stages.settings import Settings
from stages.subsample.columns import empty_sums as empty_subsample
from stages.subsample.pairs import chunk_sums

Array = np.ndarray[Any, Any]


def label(value: object) -> str:
    """A short name of a config for test ids: its method and what is not default."""
    if not isinstance(value, Settings):
        return str(value)
    changed = value.model_dump(exclude_defaults=True).values()
    return "-".join([str(getattr(value, "method", "")), *map(str, changed)])


def observed_layer(
    logits: Array, outputs: Array, top_k: int = 2, layer: int = 0, parts: int = 1
) -> LayerStatistics:
    """A softmax top-k layer on T tokens, all of them sampled, in `parts` shards.

    Router rows are the logits' own: token t is the t-th unit vector. Input matrices are the
    outputs, flattened.

    Args:
        logits: [T, E].
        outputs: [T, E, H], every expert on every token.
    """
    tokens, experts, hidden = outputs.shape
    sums, subsample = empty_sums(experts), empty_subsample(experts, hidden, 1)
    for rows in np.array_split(np.arange(tokens), parts):
        scores, values = torch.from_numpy(logits[rows]), torch.from_numpy(outputs[rows])
        top = scores.topk(top_k, dim=1)
        gates = top.values.softmax(dim=1)
        chosen = values.gather(1, top.indices.unsqueeze(2).expand(-1, -1, hidden))
        sizes = torch.linalg.vector_norm(chosen, dim=-1), chosen.abs().amax(dim=-1)
        add(sums, layer_sums(Routed(scores, top.indices, gates, *sizes), experts))
        for name, value in chunk_sums(values, top.indices, gates).items():
            subsample[name] += value.numpy()
    flat = outputs.transpose(1, 0, 2).reshape(experts, -1)
    distances = squared_distances(flat @ flat.T)
    return LayerStatistics(layer, sums, subsample, logits.T.copy(), distances)


def random_layer(
    experts: int, seed: int, *, tokens: int = 96, hidden: int = 5, layer: int = 0
) -> LayerStatistics:
    """Unrelated experts of falling popularity, in random order."""
    logits, outputs = random_tokens(experts, seed, tokens=tokens, hidden=hidden)
    return observed_layer(logits, outputs, min(2, experts), layer)


def random_tokens(
    experts: int, seed: int, *, tokens: int = 96, hidden: int = 5
) -> tuple[Array, Array]:
    """Logits [T, E] and outputs [T, E, H]."""
    generator = np.random.default_rng(seed)
    popularity = 0.6 * generator.permutation(experts)
    logits = generator.normal(size=(tokens, experts)) + popularity
    scale = generator.uniform(0.5, 2.0, size=(1, experts, 1))
    return logits, scale * generator.normal(size=(tokens, experts, hidden))


def partition(group: tuple[int | None, ...]) -> set[frozenset[int]]:
    """The members of every group, without names."""
    found: dict[int, set[int]] = {}
    for expert, index in enumerate(group):
        if index is not None:
            found.setdefault(index, set()).add(expert)
    return {frozenset(members) for members in found.values()}
