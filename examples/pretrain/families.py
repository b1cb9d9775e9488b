"""Grouping of related documents, so that near-copies do not face each other across splits.

Two translations of a chapter, or two versions of a licence, share so much text that a held-out
perplexity would partly measure recall of the training text. A family goes to one split as a whole.
Only these two kinds are searched for; rarer repetitions elsewhere stay.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

from corpus import Document

SHINGLE_WORDS = 6
MAX_CONTAINMENT = 0.25

Family = tuple[Document, ...]


def find_families(documents: Sequence[Document], domain: str) -> list[Family]:
    """Partition documents of one domain into families, in order of first appearance."""
    if domain == "legal":
        keys = overlap_keys([document.text for document in documents])
    elif domain == "scripture":
        keys = [document.source.rsplit("/", 1)[-1] for document in documents]  # e.g. "Gen.31"
    else:
        keys = [document.source for document in documents]
    groups: defaultdict[str, list[Document]] = defaultdict(list)
    for key, document in zip(keys, documents, strict=True):
        groups[key].append(document)
    return [tuple(group) for group in groups.values()]


def overlap_keys(texts: Sequence[str]) -> list[str]:
    """Family keys: texts with too large a shared part of 6-word shingles get the same key."""
    shingles = [_shingles(text) for text in texts]
    parent = list(range(len(texts)))
    for (first, second), shared in _shared_counts(shingles).items():
        shorter = min(len(shingles[first]), len(shingles[second]))
        if shared > MAX_CONTAINMENT * shorter:
            parent[_root(parent, first)] = _root(parent, second)
    return [str(_root(parent, index)) for index in range(len(texts))]


def _shingles(text: str) -> set[str]:
    words = text.lower().split()
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in starts}


def _shared_counts(shingles: Sequence[set[str]]) -> Counter[tuple[int, int]]:
    """Number of common shingles for each pair of texts (first < second) that share any."""
    owners: defaultdict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(shingles):
        for shingle in own:
            owners[shingle].append(index)
    counts: Counter[tuple[int, int]] = Counter()
    for indices in owners.values():
        counts.update(combinations(indices, 2))
    return counts


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index
