"""The whole blocks of text that hold sampled tokens: attention needs all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from stages.corpus.blocks import Batch, batches
from stages.corpus.stage import read_blocks
from stages.errors import StatisticsError


@dataclass(frozen=True)
class Text:
    """Batches, and where the sampled tokens stand in each."""

    batches: tuple[Batch, ...]
    # Per batch [n] int64, ascending: index into its B * S tokens, padding counted.
    rows: tuple[Tensor, ...]

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """(B, S) of every batch."""
        return [(len(each.rows), max(map(len, each.rows))) for each in self.batches]

    @property
    def tokens(self) -> int:
        """All tokens, padding not counted."""
        return sum(len(row) for batch in self.batches for row in batch.rows)


def sampled_blocks(inputs: Path) -> Tensor:
    """[n] int64, ascending: blocks of the corpus with a token in a layer's sample."""
    found: Tensor = torch.unique(_places(inputs)[0])
    return found


def edges(blocks: int, batch_size: int, parts: int) -> list[tuple[int, int]]:
    """Ranges of sampled blocks: whole batches, as evenly as that goes, at most `parts`."""
    found = -(-blocks // batch_size)
    parts = min(parts, found)
    cuts = [part * found // parts * batch_size for part in range(parts)] + [blocks]
    return list(pairwise(cuts))


def read_text(corpus: Path, inputs: Path, start: int, stop: int, batch_size: int) -> Text:
    """The sampled blocks `start` to `stop` - 1 of a corpus.

    Args:
        inputs: any layer's sampled inputs; all layers have the same tokens.
    """
    block, position = _places(inputs)
    numbers = torch.unique(block)[start:stop]
    first, last = int(numbers[0]), int(numbers[-1])
    read = read_blocks(corpus, first, last + 1)
    found = tuple(batches([read[int(number) - first] for number in numbers], batch_size))
    inside = (block >= first) & (block <= last)
    # Place of each sampled token's block among `numbers`.
    place, position = torch.searchsorted(numbers, block[inside]), position[inside].long()
    return Text(found, tuple(_rows(found, place, position)))


def _rows(found: Sequence[Batch], place: Tensor, position: Tensor) -> list[Tensor]:
    rows = []
    for batch in found:
        here = (place >= batch.start) & (place < batch.start + len(batch.blocks))
        length = max(map(len, batch.rows))
        rows.append((place[here] - batch.start) * length + position[here])
    return rows


def _places(inputs: Path) -> tuple[Tensor, Tensor]:
    """`block` [N] int64 and `position` [N] int32; nothing else is read of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(inputs, framework="pt") as handle:
            return handle.get_tensor("block"), handle.get_tensor("position")
    except (OSError, SafetensorError) as error:
        raise StatisticsError(f"cannot read layer inputs from {inputs}: {error}") from error
