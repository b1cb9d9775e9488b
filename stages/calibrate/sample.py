"""Which tokens of a corpus are kept: a pure function of its blocks, a seed and a number.

Neither the cut into shards nor the engine, the workers or the order of their work has a part in it,
and every layer keeps the same tokens. Each token gets a keyed 64-bit hash of where it stands; of
every domain those with the smallest hashes are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from stages.corpus.stage import block_lengths

Array = np.ndarray[Any, Any]
# Positions hashed at a time: 32 MB per array, whatever the size of the corpus.
_HASHED = 1 << 22


@dataclass(frozen=True)
class Sample:
    """N tokens in the order of the corpus: by block, then by position."""

    block: Array  # [N] int64, index of the block in the corpus
    position: Array  # [N] int32, index of the token in its block
    domain: Array  # [N] int32, index into `domains`
    domains: tuple[str, ...]  # sorted

    def __len__(self) -> int:
        return len(self.block)

    def within(self, start: int, stop: int) -> slice:
        """The tokens of blocks `start` to `stop`."""
        first, last = np.searchsorted(self.block, [start, stop])
        return slice(int(first), int(last))


def choose(
    lengths: Sequence[int] | Array, domains: Sequence[str], tokens: int, seed: int
) -> Sample:
    """At most `tokens` tokens, from every domain its share of them.

    Args:
        lengths: tokens per block, padding not counted.
        domains: the domain of each block, in any order.
    """
    sizes, names = np.asarray(lengths, np.int64), tuple(sorted(set(domains)))
    codes = {name: code for code, name in enumerate(names)}
    kinds = np.array([codes[name] for name in domains], np.int32)
    present = [int(sizes[kinds == code].sum()) for code in range(len(names))]
    found = [
        _smallest(np.flatnonzero(kinds == code), sizes, share, seed)
        for code, share in enumerate(shares(present, tokens))
    ]
    block = np.concatenate([each[0] for each in found] or [np.zeros(0, np.int64)])
    position = np.concatenate([each[1] for each in found] or [np.zeros(0, np.int64)])
    order = np.lexsort((position, block))
    block, position = block[order], position[order]
    return Sample(block, position.astype(np.int32), kinds[block], names)


def shares(present: Sequence[int], total: int) -> list[int]:
    """`total` tokens dealt out in proportion to those present: largest remainder, then order."""
    have = sum(present)
    total = min(total, have)
    floors = [count * total // have if have else 0 for count in present]
    order = sorted(range(len(present)), key=lambda i: (-(present[i] * total % max(have, 1)), i))
    for index in order[: total - sum(floors)]:
        floors[index] += 1
    return floors


def hashes(block: Array, position: Array, seed: int) -> Array:
    """`[n]` uint64: a keyed hash of each (block, position) (the finaliser of SplitMix64, chained).

    Two tokens of one block never have the same hash: each step is a bijection.
    """
    key = _mix(np.array([seed], np.int64).astype(np.uint64))
    return _mix(_mix(key ^ block.astype(np.uint64)) ^ position.astype(np.uint64))


def sample_of(corpus: Path, tokens: int, seed: int) -> Sample:
    """The sample of a corpus file; the last ones are kept, since every shard asks for the same."""
    status = corpus.stat()
    return _sample_of(corpus, status.st_size, status.st_mtime_ns, tokens, seed)


@lru_cache(maxsize=2)
def _sample_of(corpus: Path, _size: int, _time: int, tokens: int, seed: int) -> Sample:
    return choose(*block_lengths(corpus), tokens, seed)


def _smallest(blocks: Array, sizes: Array, count: int, seed: int) -> tuple[Array, Array]:
    """Block and position of the `count` tokens of some blocks with the smallest hashes."""
    kept = (np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    for some in _pieces(blocks, sizes[blocks]):
        block = np.repeat(some, sizes[some])
        starts = np.repeat(np.cumsum(sizes[some]) - sizes[some], sizes[some])
        position = np.arange(len(block)) - starts
        found = (hashes(block, position, seed), block, position)
        joined = [np.concatenate(pair) for pair in zip(kept, found, strict=True)]
        # Equal hashes, should there ever be any, are told apart by where they stand.
        order = np.lexsort((joined[2], joined[1], joined[0]))[:count]
        kept = (joined[0][order], joined[1][order], joined[2][order])
    return kept[1], kept[2]


def _pieces(blocks: Array, sizes: Array) -> list[Array]:
    """Runs of blocks with about `_HASHED` tokens each."""
    edges = np.flatnonzero(np.diff(np.cumsum(sizes) // _HASHED)) + 1
    return np.split(blocks, edges)


def _mix(values: Array) -> Array:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
