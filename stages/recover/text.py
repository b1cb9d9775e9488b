"""The text that is trained on, read block by block from where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from stages.corpus.blocks import Block


class Text:
    """Blocks of a corpus file, mapped into memory: only those that are asked for are read."""

    def __init__(self, path: Path) -> None:
        self._map = pa.memory_map(str(path))
        self._table = pa.ipc.open_file(self._map).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def blocks(self, indices: Sequence[int]) -> list[Block]:
        """Those of the given indices, in their order."""
        rows = self._table.take(indices).to_pylist()
        return [Block(row["domain"], tuple(row["tokens"])) for row in rows]
