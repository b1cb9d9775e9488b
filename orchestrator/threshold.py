"""The global threshold of S: scores per layer fan out, one decision, numbers for the layer jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pyarrow as pa

from orchestrator import estimate, pipeline
from orchestrator.chain import Schedule
from orchestrator.preflight import Prepared, Variant
from stages.compress import scores
from stages.compress.threshold import Numbers, share_out
from stages.export.layout import file_layouts
from stages.group.decision import LayerDecision

SCHEMA = pa.schema([("layer", pa.int32()), ("matrix", pa.string()), ("rows", pa.int32())])
Settle = Callable[[pa.Table], pa.Table]


def settled(
    run: Prepared,
    variant: Variant,
    decisions: Sequence[LayerDecision],
    schedule: Schedule,
    settle: Settle,
) -> Variant:
    """The variant with a number of rows per layer and matrix, where those are not all alike.

    Args:
        settle: writes the decision, or refuses one that differs from what was written.
    """
    config = variant.export.compress
    if config is None or config.threshold == "layer":
        return variant
    layouts = file_layouts(run.moe, decisions, variant.export)
    written = pipeline.transform_units(run, variant, decisions, layouts)
    units = scores.plan(written, run.folder.threshold)
    schedule("threshold", units, scores.run_one, estimate.transform(run))
    curves = [curve for unit in units for curve in scores.read_curves(unit.output)]
    numbers = from_table(settle(to_table(share_out(curves, config.multiple))))
    changed = config.model_copy(update={"numbers": numbers})
    return replace(variant, export=variant.export.model_copy(update={"compress": changed}))


def to_table(numbers: Numbers) -> pa.Table:
    """Rows sorted by layer and matrix."""
    found = [
        {"layer": layer, "matrix": matrix, "rows": rows}
        for layer, each in sorted(numbers.items())
        for matrix, rows in sorted(each.items())
    ]
    return pa.Table.from_pylist(found, schema=SCHEMA)


def from_table(table: pa.Table) -> Numbers:
    """The inverse of `to_table`."""
    found: Numbers = {}
    for row in table.to_pylist():
        found.setdefault(row["layer"], {})[row["matrix"]] = row["rows"]
    return found
