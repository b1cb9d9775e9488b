"""Adds up the statistics of shards: one pass in shard order, in the memory of the result.

Shards are mapped, not read: of 1,000 shards one lies in memory at a time. Columns are added in
place by (domain, layer), which is the same addition, in the same order, for any number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stages.calibrate.observer import INTEGERS, SCALARS, VECTORS, Sums
from stages.calibrate.statistics import Key, check_columns, damaged, schema
from stages.errors import StatisticsError

_MAXIMA = ("max_abs",)


def add_files(paths: Sequence[Path]) -> pa.Table:
    """The sum of shard files, in the order given.

    Raises:
        StatisticsError: a damaged file, or shards of different models or data.
    """
    total = Total()
    for path in paths:
        with mapped(path) as source:
            total.add(_opened(path, source))
    return total.table()


def add_tables(tables: Iterable[pa.Table]) -> pa.Table:
    """The sum of shard tables, in the order given.

    Raises:
        StatisticsError: shards of different models or data.
    """
    total = Total()
    for table in tables:
        total.add(table)
    return total.table()


def mapped(path: Path) -> pa.MemoryMappedFile:
    """A file whose pages are read when they are touched.

    Raises:
        StatisticsError: it cannot be opened.
    """
    try:
        return pa.memory_map(str(path))
    except OSError as error:
        raise damaged(path, error) from error


class Total:
    """The sum of the tables so far."""

    def __init__(self) -> None:
        self._sums: dict[Key, Sums] = {}
        self._schema: pa.Schema | None = None

    def add(self, table: pa.Table) -> None:
        """Adds one table in place; its memory is not kept.

        Raises:
            StatisticsError: it is of another model or other data than the ones before.
        """
        if self._schema is not None and table.schema.metadata != self._schema.metadata:
            raise StatisticsError("statistics shards disagree on model, tokenizer or data")
        self._schema = self._schema or table.schema
        for key, columns in _slices(table):
            found = self._sums.get(key)
            if found is None:
                self._sums[key] = {name: values.copy() for name, values in columns.items()}
            else:
                for name, values in columns.items():
                    combine = np.maximum if name in _MAXIMA else np.add
                    combine(found[name], values, out=found[name])

    def table(self) -> pa.Table:
        """The sum, by domain and layer. Gives up the memory of the sums, column by column."""
        assert self._schema is not None
        width, keys = _width(self._schema), sorted(self._sums)
        columns: dict[str, Any] = {
            "domain": [domain for domain, _ in keys for _ in range(width)],
            "layer": np.repeat([layer for _, layer in keys], width).astype(np.int32),
            "expert": np.tile(np.arange(width, dtype=np.int32), len(keys)),
        }
        for name in SCALARS + VECTORS:
            flat = pa.array(np.concatenate([self._sums[key].pop(name) for key in keys]))
            vector = name in VECTORS
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, width) if vector else flat
        return pa.table(columns, schema=schema(width, {}).with_metadata(self._schema.metadata))


def _opened(path: Path, source: pa.MemoryMappedFile) -> pa.Table:
    try:
        table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(path, error) from error
    return check_columns(path, table)


def _slices(table: pa.Table) -> Iterator[tuple[Key, Sums]]:
    """(domain, layer) -> flat columns; a vector column has E*E values. Nothing is copied."""
    width = _width(table.schema)
    domains = [table["domain"][row].as_py() for row in range(0, table.num_rows, width)]
    layers = table["layer"].to_numpy()[::width].tolist()
    columns = {name: _flat(table[name], name) for name in SCALARS + VECTORS}
    for index, key in enumerate(zip(domains, layers, strict=True)):
        yield (
            key,
            {
                name: values[index * size : (index + 1) * size]
                for name, values in columns.items()
                for size in [width * width if name in VECTORS else width]
            },
        )


def _flat(column: pa.ChunkedArray, name: str) -> np.ndarray[Any, Any]:
    # A shard is written as one batch; only a table from elsewhere has to be joined first.
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    values = array.flatten() if name in VECTORS else array
    found = values.to_numpy(zero_copy_only=True)
    return np.asarray(found, np.int64 if name in INTEGERS else np.float64)


def _width(kind: pa.Schema) -> int:
    return int(kind.field(VECTORS[0]).type.list_size)
