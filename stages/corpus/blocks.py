"""Tokens to blocks of a fixed length. Pure functions; padding is described, never stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """At most `sequence_length` tokens of one domain; shorter ones are padded when batched."""

    domain: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Consecutive blocks of one domain that pass the model together."""

    start: int  # index of the first block in the corpus
    blocks: tuple[Block, ...]

    @property
    def domain(self) -> str:
        """The domain of all its blocks."""
        return self.blocks[0].domain

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """Tokens per block."""
        return [block.tokens for block in self.blocks]


def batches(blocks: Sequence[Block], size: int, start: int = 0) -> Iterator[Batch]:
    """Batches of at most `size` blocks; `start` is the index of the first block in the corpus."""
    first = 0
    while first < len(blocks):
        last = first + 1
        while (
            last < len(blocks)
            and last - first < size
            and blocks[last].domain == blocks[first].domain
        ):
            last += 1
        yield Batch(start + first, tuple(blocks[first:last]))
        first = last


def packed(
    domain: str, documents: Iterable[list[int]], length: int, budget: int, separator: list[int]
) -> Iterator[Block]:
    """Joins documents with `separator` and cuts blocks until `budget` tokens were given out."""
    held: list[int] = []
    for document in documents:
        held += document + separator
        while len(held) >= min(length, budget) > 0:
            take = min(length, budget)
            yield Block(domain, tuple(held[:take]))
            held, budget = held[take:], budget - take
        if budget == 0:
            return
    if held:
        yield Block(domain, tuple(held))


def padded(
    domain: str, documents: Iterable[list[int]], length: int, budget: int
) -> Iterator[Block]:
    """One document per block, cut at `length`, until `budget` tokens were given out."""
    for document in documents:
        block = document[: min(length, budget)]
        if block:
            yield Block(domain, tuple(block))
            budget -= len(block)
        if budget == 0:
            return


def split_budget(total: int, weights: list[float]) -> list[int]:
    """Integers in proportion to `weights` that sum to `total` (largest remainder, then order)."""
    scale = total / sum(weights)
    floors = [int(weight * scale) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (floors[i] - weights[i] * scale, i))
    for index in by_remainder[: total - sum(floors)]:
        floors[index] += 1
    return floors
