"""A planted checkpoint with experts merged in pairs, written layer by layer, not assembled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.moe import MoeCheckpoint
from stages.calibrate.config import Engine
from stages.export.config import ExportConfig
from stages.export.layout import file_layouts
from stages.export.stage import ExportUnit
from stages.group.decision import from_labels
from stages.transform.stage import run_one as transform
from tests.planted_families import EXPERTS
from tests.tiny import transform_units


def export_unit(folder: Path, form: Any, engine: Engine = "resident") -> ExportUnit:
    """The export of `folder/original` in a format, to `folder/output`."""
    moe = MoeCheckpoint.open(folder / "original")
    labels = [expert // 2 * 2 for expert in range(EXPERTS)]
    decisions = [from_labels(layer, labels, [1.0] * EXPERTS) for layer in moe.layers]
    config = ExportConfig(format=form)
    units = transform_units(moe, decisions, folder, config)
    for each in units:
        transform(each)
    return ExportUnit(
        moe=moe,
        decisions=tuple(decisions),
        layouts=tuple(file_layouts(moe, decisions, config)),
        files=tuple(each.output for each in units),
        digests=(),
        config=config,
        threads=1,
        output=folder / "output",
        engine=engine,
    )
