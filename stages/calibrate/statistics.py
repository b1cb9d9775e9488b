"""The statistics table: Arrow in, Arrow out, and plain arrays for the deciding methods.

Rows are (domain, layer, expert), sorted; columns are sums over tokens (docs/architecture.md).
Shards hold only the domains that they saw, so a table grows with what was observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from models.arrow import read_table
from stages.calibrate.observer import (
    INTEGERS,
    SCALARS,
    VECTORS,
    Sums,
)
from stages.errors import StatisticsError

Key = tuple[str, int]  # domain, layer
_MAXIMA = ("max_abs",)


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer, summed over domains; arrays as in `observer.empty_sums`.

    What only some deciding methods need is None until `stages.group.provide` attaches it.
    """

    layer: int
    sums: Sums
    # What all experts did on the sampled tokens: arrays as in `stages.subsample.columns`.
    subsample: Sums | None = None
    # [E, H] router rows.
    router: np.ndarray[Any, Any] | None = None
    # [E, E] squared distances of the experts' input matrices, gate and up.
    weights: np.ndarray[Any, Any] | None = None
    # Width -> what it costs to give it to this layer alone: measured, or predicted.
    curve: Mapping[int, float] | None = None
    # How much of an error in the layer's output reaches the end of the model.
    gain: float = 1.0
    # Experts that must stay as they are.
    protected: tuple[int, ...] = ()

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.sums["selected"])

    @property
    def tokens(self) -> int:
        """Tokens that passed the layer."""
        return int(self.sums["tokens"][0])

    @property
    def frequency(self) -> np.ndarray[Any, Any]:
        """[E] float64: share of the layer's selections, summing to 1 (row normalisation)."""
        selected = self.sums["selected"].astype(np.float64)
        return np.asarray(selected / max(selected.sum(), 1.0))


def schema(num_experts: int, metadata: Mapping[str, str]) -> pa.Schema:
    """The table's schema; provenance travels in its metadata."""
    fields = [("domain", pa.string()), ("layer", pa.int32()), ("expert", pa.int32())]
    fields += [(name, pa.int64() if name in INTEGERS else pa.float64()) for name in SCALARS]
    for name in VECTORS:
        kind = pa.int64() if name in INTEGERS else pa.float64()
        fields.append((name, pa.list_(kind, num_experts)))
    return pa.schema(fields, metadata=dict(metadata))


def to_table(sums: Mapping[Key, Sums], num_experts: int, metadata: Mapping[str, str]) -> pa.Table:
    """Rows for every (domain, layer) and expert, in sorted order."""
    keys = sorted(sums)
    columns: dict[str, Any] = {
        "domain": [domain for domain, _ in keys for _ in range(num_experts)],
        "layer": [layer for _, layer in keys for _ in range(num_experts)],
        "expert": [expert for _ in keys for expert in range(num_experts)],
    }
    for name in SCALARS + VECTORS:
        flat = np.concatenate([sums[key][name].reshape(-1) for key in keys])
        columns[name] = (
            pa.FixedSizeListArray.from_arrays(pa.array(flat), num_experts)
            if name in VECTORS
            else pa.array(flat)
        )
    return pa.table(columns, schema=schema(num_experts, metadata))


def read_statistics(path: Path) -> pa.Table:
    """Reads a statistics table.

    Raises:
        StatisticsError: missing, damaged or not a statistics table.
    """
    try:
        table = read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(path, error) from error
    return check_columns(path, table)


def damaged(path: Path, error: Exception) -> StatisticsError:
    """A table that cannot be opened."""
    return StatisticsError(f"cannot read statistics from {path}: {error}")


def check_columns(path: Path, table: pa.Table) -> pa.Table:
    """The table, if it is one of statistics.

    Raises:
        StatisticsError: what it lacks.
    """
    missing = [name for name in SCALARS + VECTORS if name not in table.column_names]
    if missing:
        raise StatisticsError(f"{path} is no statistics table: it lacks {', '.join(missing)}")
    return table


def metadata_of(table: pa.Table) -> dict[str, str]:
    """Provenance of a statistics table."""
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def layers_of(table: pa.Table) -> list[LayerStatistics]:
    """One entry per layer, ascending, summed over domains in sorted order."""
    found: dict[int, Sums] = {}
    for (_, layer), sums in sorted(domain_sums(table).items()):
        if layer in found:
            for name, values in sums.items():
                combine = np.maximum if name in _MAXIMA else np.add
                found[layer][name] = combine(found[layer][name], values)
        else:
            found[layer] = dict(sums)
    return [LayerStatistics(layer, sums) for layer, sums in sorted(found.items())]


def domain_sums(table: pa.Table) -> dict[Key, Sums]:
    """(domain, layer) -> arrays."""
    found: dict[Key, Sums] = {}
    for key, columns in _slices(table):
        found[key] = {
            name: values.to_numpy(zero_copy_only=False).reshape(
                (-1, len(columns["tokens"])) if name in VECTORS else -1
            )
            for name, values in columns.items()
        }
    return found


def _slices(table: pa.Table) -> list[tuple[Key, dict[str, Any]]]:
    """(domain, layer) -> flat column arrays; a vector column becomes E*E values."""
    width = table.schema.field(VECTORS[0]).type.list_size
    table = table.combine_chunks()
    found: list[tuple[Key, dict[str, Any]]] = []
    for start in range(0, table.num_rows, width):
        part = table.slice(start, width)
        key = (part["domain"][0].as_py(), part["layer"][0].as_py())
        arrays = {name: part[name].combine_chunks() for name in SCALARS + VECTORS}
        found.append((key, {n: a.flatten() if n in VECTORS else a for n, a in arrays.items()}))
    return found
