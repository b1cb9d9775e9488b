"""The decision table: what becomes of every expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("expert", pa.int32()),
        # Index of the merged expert within its layer; null for a dropped expert.
        ("group", pa.int32()),
        ("is_representative", pa.bool_()),
        ("weight", pa.float64()),
        ("action", pa.string()),
        # Neurons that every expert of the layer keeps; null: all.
        ("width", pa.int32()),
        # The expert's part of the layer's predicted error (`predict.py`); null: no sample.
        ("predicted_error", pa.float64()),
    ]
)


@dataclass(frozen=True)
class LayerDecision:
    """One layer: `group[e]` of every expert (None: dropped) and the representative per group.

    Groups are numbered by ascending id of their representative, so that the table depends on the
    partition alone.
    """

    layer: int
    group: tuple[int | None, ...]
    representatives: tuple[int, ...]
    weight: tuple[float, ...]
    width: int | None = None

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Group -> ids of its members, ascending."""
        found: list[list[int]] = [[] for _ in self.representatives]
        for expert, group in enumerate(self.group):
            if group is not None:
                found[group].append(expert)
        return tuple(tuple(ids) for ids in found)

    def action(self, expert: int) -> str:
        """keep (alone in its group), merge or drop."""
        group = self.group[expert]
        if group is None:
            return "drop"
        return "keep" if len(self.members[group]) == 1 else "merge"


def from_labels(
    layer: int, representative_of: Sequence[int | None], weight: Sequence[float]
) -> LayerDecision:
    """A decision from each expert's representative (None: dropped)."""
    representatives = tuple(sorted({r for r in representative_of if r is not None}))
    index = {expert: group for group, expert in enumerate(representatives)}
    group = tuple(None if r is None else index[r] for r in representative_of)
    return LayerDecision(layer, group, representatives, tuple(weight))


def to_table(
    decisions: Sequence[LayerDecision],
    metadata: Mapping[str, str],
    errors: Mapping[int, Sequence[float]] | None = None,
) -> pa.Table:
    """Rows sorted by layer and expert.

    Args:
        errors: layer -> each expert's part of the predicted error; layers may be missing.
    """
    known = errors or {}
    rows = [
        {
            "layer": decision.layer,
            "expert": expert,
            "group": group,
            "is_representative": expert in decision.representatives,
            "weight": decision.weight[expert],
            "action": decision.action(expert),
            "width": decision.width,
            "predicted_error": known[decision.layer][expert] if decision.layer in known else None,
        }
        for decision in sorted(decisions, key=lambda d: d.layer)
        for expert, group in enumerate(decision.group)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(dict(metadata)))


def from_table(table: pa.Table) -> list[LayerDecision]:
    """The inverse of `to_table`."""
    by_layer: dict[int, list[dict[str, object]]] = {}
    for row in table.to_pylist():
        by_layer.setdefault(row["layer"], []).append(row)
    return [_layer(layer, rows) for layer, rows in sorted(by_layer.items())]


def _layer(layer: int, rows: list[dict[str, object]]) -> LayerDecision:
    groups = tuple(None if row["group"] is None else int(str(row["group"])) for row in rows)
    chosen = sorted(
        (group, expert)
        for expert, (row, group) in enumerate(zip(rows, groups, strict=True))
        if row["is_representative"] and group is not None
    )
    weights = tuple(float(str(row["weight"])) for row in rows)
    width = rows[0]["width"]
    return LayerDecision(
        layer=layer,
        group=groups,
        representatives=tuple(expert for _, expert in chosen),
        weight=weights,
        width=None if width is None else int(str(width)),
    )
