"""Which blocks of text a step sees. Depends on seed, blocks and batch alone, never on ranks."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def blocks_of_step(step: int, count: int, batch: int, seed: int) -> list[int]:
    """Indices of the `batch` blocks of a step: epoch after epoch, each in an order of its own.

    Args:
        step: from 0.
        count: blocks there are.
    """
    found: list[int] = []
    while len(found) < batch:
        epoch, place = divmod(step * batch + len(found), count)
        found += _order(count, seed, epoch)[place : place + batch - len(found)]
    return found


def share_of(blocks: list[int], rank: int, ranks: int, size: int) -> list[list[int]]:
    """A rank's part of a step, cut into passes of at most `size` blocks.

    Every rank gets as many passes, of as many blocks: their number must be a multiple of `ranks`.
    """
    assert len(blocks) % ranks == 0, (len(blocks), ranks)
    each = len(blocks) // ranks
    own = blocks[rank * each : (rank + 1) * each]
    return [own[start : start + size] for start in range(0, each, size)]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    found: list[int] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return found
