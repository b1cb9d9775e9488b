"""The native format: K experts, K router rows, names of the family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.moe import MoeCheckpoint
from stages.errors import BudgetError
from stages.export.config import ExportConfig
from stages.export.formats.native import Native
from stages.group.decision import from_labels
from tests.tiny import FAMILIES, compress, logits_of, open_model, random_ids, save_tiny

WEIGHT = [0.4, 0.1, 0.2, 0.1, 0.1, 0.1]
LABELS = [0, 2, 2, 0, 4, 4]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path_factory.mktemp("model"), "mixtral"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_opens_as_the_family_itself_with_fewer_experts(
    tmp_path: Path, family: str
) -> None:
    moe = MoeCheckpoint.open(save_tiny(tmp_path / "model", family))
    decisions = [from_labels(layer, LABELS, WEIGHT) for layer in moe.layers]

    output = compress(moe, decisions, tmp_path)

    assert MoeCheckpoint.open(output).num_experts == 3
    model = open_model(output)
    assert model.config.model_type == family
    assert logits_of(model, random_ids(2, 5)).isfinite().all()


def test_router_rows_are_those_of_the_representatives(moe: MoeCheckpoint, tmp_path: Path) -> None:
    decisions = [from_labels(layer, LABELS, WEIGHT) for layer in moe.layers]

    output = MoeCheckpoint.open(compress(moe, decisions, tmp_path))

    assert output.read_router(1).equal(moe.read_router(1)[[0, 2, 4]])


def test_router_rows_can_be_weighted_means(moe: MoeCheckpoint, tmp_path: Path) -> None:
    decisions = [from_labels(layer, [0, 2, 2, 0, 4, 5], WEIGHT) for layer in moe.layers]

    output = compress(moe, decisions, tmp_path, ExportConfig(router="mean"))

    rows, before = MoeCheckpoint.open(output).read_router(0), moe.read_router(0)
    torch.testing.assert_close(rows[0], 0.8 * before[0] + 0.2 * before[3])
    torch.testing.assert_close(rows[1], before[1] / 3 + 2 * before[2] / 3)
    assert rows[2:].equal(before[4:])


def test_different_counts_per_layer_are_refused(moe: MoeCheckpoint) -> None:
    decisions = [from_labels(0, LABELS, WEIGHT), from_labels(1, [0] * 6, WEIGHT)]

    with pytest.raises(BudgetError, match="has 1 to 3"):
        Native().check(moe, decisions)


def test_fewer_experts_than_the_router_selects_are_refused(moe: MoeCheckpoint) -> None:
    decisions = [from_labels(layer, [0] * 6, WEIGHT) for layer in moe.layers]

    with pytest.raises(BudgetError, match="1 experts per layer are fewer than the 2"):
        Native().check(moe, decisions)


def test_as_many_experts_as_the_router_selects_are_enough(moe: MoeCheckpoint) -> None:
    Native().check(moe, [from_labels(layer, [0] * 5 + [5], WEIGHT) for layer in moe.layers])
