"""The expanded format: every slot holds its group's expert."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.moe import MoeCheckpoint
from stages.errors import BudgetError
from stages.export.config import ExportConfig
from stages.export.formats.expanded import Expanded
from stages.group.decision import from_labels
from tests.tiny import FAMILIES, compress, open_model, same, save_tiny

WEIGHT = [0.4, 0.1, 0.2, 0.1, 0.1, 0.1]
LABELS = [0, 2, 2, 0, 4, 4]


@pytest.fixture(params=FAMILIES)
def moe(request: pytest.FixtureRequest, tmp_path: Path) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path / "model", request.param))


def test_members_of_a_group_are_alike_and_groups_differ(moe: MoeCheckpoint, tmp_path: Path) -> None:
    decisions = [from_labels(layer, LABELS, WEIGHT) for layer in moe.layers]

    output = compress(moe, decisions, tmp_path, ExportConfig(format="expanded"))

    found = MoeCheckpoint.open(output).read_experts(moe.layers[1], list(range(6)))
    for a in range(6):
        for b in range(6):
            assert same(found[a], found[b]) == (LABELS[a] == LABELS[b])


def test_router_and_config_are_unchanged(moe: MoeCheckpoint, tmp_path: Path) -> None:
    decisions = [from_labels(layer, LABELS, WEIGHT) for layer in moe.layers]

    output = compress(moe, decisions, tmp_path, ExportConfig(format="expanded"))

    found = MoeCheckpoint.open(output)
    assert found.read_router(moe.layers[0]).equal(moe.read_router(moe.layers[0]))
    assert found.checkpoint.config == moe.checkpoint.config
    assert open_model(output).config.model_type == moe.family.model_type


def test_dropped_experts_are_refused(moe: MoeCheckpoint) -> None:
    decisions = [from_labels(layer, [0, None, 2, 3, 4, 5], WEIGHT) for layer in moe.layers]

    with pytest.raises(BudgetError, match="expanded format"):
        Expanded().check(moe, decisions)
