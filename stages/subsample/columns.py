"""The columns of the subsample table. Everything is a sum over sampled tokens, by domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]
Sums = dict[str, Array]

INTEGERS = ("sampled", "sampled_selected")
SCALARS = (*INTEGERS, "output_sq", "gated_energy")
OUTPUTS = ("mean_output", "routed_output")  # [E, H]
PAIRS = ("swap", "both", "gated_gram", "cosine", "output_gram")  # [E, E]
NEURONS = ("neuron_energy", "neuron_gated", "neuron_output")  # [E, I]
VECTORS = OUTPUTS + PAIRS + NEURONS


def empty_sums(experts: int, hidden: int, neurons: int) -> Sums:
    """Zeros for one domain and layer: `[E]` per scalar, `[E, width]` per vector column."""
    widths = dict.fromkeys(OUTPUTS, hidden)
    widths |= dict.fromkeys(PAIRS, experts) | dict.fromkeys(NEURONS, neurons)
    found: Sums = {
        name: np.zeros(experts, np.int64 if name in INTEGERS else np.float64) for name in SCALARS
    }
    return found | {name: np.zeros((experts, widths[name])) for name in VECTORS}


def to_table(layer: int, sums: Mapping[str, Sums], metadata: Mapping[str, str]) -> pa.Table:
    """Rows (domain, layer, expert), sorted."""
    domains = sorted(sums)
    count = len(next(iter(sums.values()))["sampled"])
    columns: dict[str, Any] = {
        "domain": pa.array([d for d in domains for _ in range(count)], pa.string()),
        "layer": pa.array(np.full(len(domains) * count, layer, np.int32)),
        "expert": pa.array(np.tile(np.arange(count, dtype=np.int32), len(domains))),
    }
    for name in SCALARS:
        columns[name] = pa.array(np.concatenate([sums[domain][name] for domain in domains]))
    for name in VECTORS:
        values = np.concatenate([sums[domain][name] for domain in domains])
        flat = pa.array(values.reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(columns).replace_schema_metadata(dict(metadata))


def from_table(table: pa.Table) -> dict[str, Sums]:
    """Domain -> sums of the one layer of a table."""
    table = table.combine_chunks()
    domains = table["domain"].to_pylist()
    found: dict[str, Sums] = {}
    for domain in dict.fromkeys(domains):
        rows = table.slice(domains.index(domain), domains.count(domain))
        found[domain] = {name: rows[name].to_numpy().copy() for name in SCALARS}
        for name in VECTORS:
            flat = rows[name].combine_chunks().flatten().to_numpy()
            found[domain][name] = flat.reshape(rows.num_rows, -1).copy()
    return found


def table_bytes(experts: int, hidden: int, neurons: int) -> int:
    """Bytes of the values of one domain and layer."""
    vectors = len(OUTPUTS) * hidden + len(PAIRS) * experts + len(NEURONS) * neurons
    return 8 * experts * (len(SCALARS) + vectors)
