"""The mapped format: the router as it was, and a map from its rows to fewer experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.mapped.registration import modeling_source, register
from models.moe import MoeCheckpoint
from stages.errors import BudgetError
from stages.export.config import ExportConfig
from stages.export.formats.mapped import Mapped
from stages.group.decision import LayerDecision, from_labels
from tests.tiny import FAMILIES, compress, logits_of, open_model, random_ids, save_tiny

WEIGHT = [0.4, 0.1, 0.2, 0.1, 0.1, 0.1]
MAPPED = ExportConfig(format="mapped")


@pytest.fixture(params=FAMILIES)
def moe(request: pytest.FixtureRequest, tmp_path: Path) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path / "model", request.param))


def uneven(moe: MoeCheckpoint) -> list[LayerDecision]:
    """3 groups in the first layer; a single one, fewer than top-k, in the last."""
    first, last = moe.layers
    return [from_labels(first, [0, 2, 2, 0, 4, 4], WEIGHT), from_labels(last, [3] * 6, WEIGHT)]


def block(moe: MoeCheckpoint, layer: int) -> str:
    return f"model.layers.{layer}.mlp."


def test_router_rows_are_unchanged_bit_for_bit(moe: MoeCheckpoint, tmp_path: Path) -> None:
    found = load_file(compress(moe, uneven(moe), tmp_path, MAPPED) / "model.safetensors")

    for layer in moe.layers:
        assert found[block(moe, layer) + "gate.weight"].equal(moe.read_router(layer))


def test_the_map_reaches_every_stored_expert_and_no_other(
    moe: MoeCheckpoint, tmp_path: Path
) -> None:
    found = load_file(compress(moe, uneven(moe), tmp_path, MAPPED) / "model.safetensors")

    for decision in uneven(moe):
        slots = found[block(moe, decision.layer) + "experts.expert_map"]
        stored = found[block(moe, decision.layer) + "experts.down_proj"].shape[0]
        assert slots.dtype == torch.int64
        assert slots.tolist() == list(decision.group)
        assert set(slots.tolist()) == set(range(stored))


def test_fused_matrices_hold_gate_above_up(moe: MoeCheckpoint, tmp_path: Path) -> None:
    keep_all = [from_labels(layer, range(6), WEIGHT) for layer in moe.layers]

    found = load_file(compress(moe, keep_all, tmp_path, MAPPED) / "model.safetensors")

    expert, name = moe.read_expert(moe.layers[0], 5), block(moe, moe.layers[0])
    assert expert.gate is not None
    assert found[name + "experts.gate_up_proj"][5].equal(torch.cat([expert.gate, expert.up]))
    assert found[name + "experts.down_proj"][5].equal(expert.down)


def test_the_mapped_model_computes_what_the_expanded_one_does(
    moe: MoeCheckpoint, tmp_path: Path
) -> None:
    """Both experts of a token in one group included: its gates add up."""
    register()
    ids = random_ids(4, 12)
    outputs = [
        compress(moe, uneven(moe), tmp_path / form, ExportConfig(format=form))
        for form in ("mapped", "expanded")
    ]

    mapped, expanded = (logits_of(open_model(output), ids) for output in outputs)

    torch.testing.assert_close(mapped, expanded, rtol=1e-5, atol=1e-5)


def test_the_mapped_model_stores_fewer_parameters(moe: MoeCheckpoint, tmp_path: Path) -> None:
    register()

    model = open_model(compress(moe, uneven(moe), tmp_path, MAPPED))

    first = moe.layers[0]
    before = sum(p.numel() for p in open_model(moe.checkpoint.folder).parameters())
    per_expert = sum(tensor.numel() for tensor in moe.read_expert(first, 0).tensors().values())
    after = sum(p.numel() for p in model.parameters())
    assert before - after == (3 + 5) * per_expert


def test_dropped_experts_are_refused(moe: MoeCheckpoint) -> None:
    decisions = [from_labels(layer, [0, None, 2, 3, 4, 5], WEIGHT) for layer in moe.layers]

    with pytest.raises(BudgetError, match="the decision drops 2"):
        Mapped().check(moe, decisions)


def test_the_modeling_file_goes_with_the_weights(moe: MoeCheckpoint) -> None:
    (path,) = Mapped().extra_files(moe).values()

    assert path == modeling_source()
    assert Mapped().needs_code
