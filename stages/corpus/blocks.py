"""Tokens to blocks of a fixed length. Pure functions; padding is described, never stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """At most `sequence_length` tokens of one domain; shorter ones are padded when batched."""

    domain: str
    tokens: tuple[int, ...]


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
        if budget == 0:
            return
        block = document[: min(length, budget)]
        if block:
            yield Block(domain, tuple(block))
            budget -= len(block)


def split_budget(total: int, weights: list[float]) -> list[int]:
    """Integers in proportion to `weights` that sum to `total` (largest remainder, then order)."""
    scale = total / sum(weights)
    floors = [int(weight * scale) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (floors[i] - weights[i] * scale, i))
    for index in by_remainder[: total - sum(floors)]:
        floors[index] += 1
    return floors
