"""Hidden states of a part of the text in one file; one batch at a time is in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from models.atomic import reporting_full_disk
from models.errors import CheckpointError


class Stream:
    """Batches `[B, S, H]` float32, one behind the other; `[B, S, n, H]` of `states` n > 1.

    Of several states the hidden one is the first. Where a batch comes without the others, before
    the first layer and behind the last, they are zero.
    """

    def __init__(
        self, path: Path, shapes: Sequence[tuple[int, int]], hidden: int, states: int = 1
    ) -> None:
        self.path = path
        width = (hidden,) if states == 1 else (states, hidden)
        self._shapes = [(*shape, *width) for shape in shapes]
        sizes = [4 * math.prod(shape) for shape in self._shapes]
        self._starts, self._total = [0, *accumulate(sizes)], sum(sizes)

    def write(self, number: int, states: Tensor) -> None:
        """One batch, over what is there."""
        whole = self._shapes[number]
        if states.ndim < len(whole):
            rest = states.new_zeros(*whole[:2], whole[2] - 1, whole[3])
            states = torch.cat([states.unsqueeze(2), rest], dim=2)
        raw = states.float().contiguous().view(torch.uint8).numpy(force=True)
        self.path.touch()
        with reporting_full_disk(self.path), self.path.open("r+b") as file:
            file.seek(self._starts[number])
            file.write(raw.data)

    def read(self, number: int) -> Tensor:
        """`[B, S, H]` or `[B, S, n, H]` on the CPU.

        Raises:
            CheckpointError: the file is not there, or not whole.
        """
        found = torch.empty(self._shapes[number], dtype=torch.float32)
        try:
            with self.path.open("rb") as file:
                file.seek(self._starts[number])
                count = file.readinto(found.view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(f"cannot read hidden states: {error}") from error
        if count != found.nbytes:
            raise CheckpointError(f"{self.path} ends early: {self._total} bytes were expected")
        return found
