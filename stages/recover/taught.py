"""What the original says at every position of the text, in Arrow files that are read in place.

One row per block of text, `ids` and `log_probabilities` flattened from [n, k] and `rest` [n] for
its n = length - 1 predicted positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.arrow import write_table
from stages.recover.loss import Teacher

_SCHEMA = pa.schema(
    [
        ("ids", pa.large_list(pa.int32())),
        ("log_probabilities", pa.large_list(pa.float32())),
        ("rest", pa.large_list(pa.float32())),
    ]
)


def write_taught(path: Path, rows: Sequence[Teacher]) -> None:
    """One file for the blocks of a part, atomically."""
    columns: dict[str, list[Any]] = {
        "ids": [row.ids.int().flatten().numpy(force=True) for row in rows],
        "log_probabilities": [row.log_probabilities.flatten().numpy(force=True) for row in rows],
        "rest": [row.rest.numpy(force=True) for row in rows],
    }
    write_table(path, pa.table(columns, schema=_SCHEMA))


class Taught:
    """All parts, mapped into memory: only the pages of the blocks that are asked for are read."""

    def __init__(self, files: Sequence[Path]) -> None:
        """`files`: the parts in the order of the text."""
        self._maps = [pa.memory_map(str(path)) for path in files]
        self._tables = [pa.ipc.open_file(each).read_all() for each in self._maps]
        self._starts = np.cumsum([0, *(table.num_rows for table in self._tables)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def block(self, index: int) -> Teacher:
        """What was said along one block of text."""
        part = bisect_right(self._starts, index) - 1
        row = index - self._starts[part]
        ids, named, rest = (self._column(part, name, row) for name in _SCHEMA.names)
        shape = (len(rest), -1)
        return Teacher(ids.long().view(shape), named.view(shape), rest)

    def blocks(self, indices: Sequence[int]) -> Teacher:
        """Several blocks, one behind the other."""
        found = [self.block(index) for index in indices]
        return Teacher(
            torch.cat([each.ids for each in found]),
            torch.cat([each.log_probabilities for each in found]),
            torch.cat([each.rest for each in found]),
        )

    def _column(self, part: int, name: str, row: int) -> Tensor:
        values = self._tables[part][name][row].values
        return torch.from_numpy(values.to_numpy(zero_copy_only=True).copy())
