"""A part of a model is the model itself with fewer experts, and reads no more than it holds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from models.checkpoint import Checkpoint, Piece
from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from models.partial import experts_module, load_part
from tests.tiny import (
    EXPERTS,
    FAMILIES,
    logits_of,
    open_model,
    random_ids,
    same_bits,
    save_tiny,
)


@pytest.fixture(scope="module", params=FAMILIES)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path_factory.mktemp("model"), request.param))


def test_all_experts_give_the_model_that_transformers_opens(moe: MoeCheckpoint) -> None:
    ids = random_ids(2, 11)

    found = load_part(moe, range(EXPERTS), "auto")

    assert same_bits(logits_of(found, ids), logits_of(open_model(moe.checkpoint.folder), ids))


def test_a_part_holds_its_experts_and_everything_dense(moe: MoeCheckpoint) -> None:
    whole = open_model(moe.checkpoint.folder)

    part = load_part(moe, range(2, 4), "auto")

    for layer in moe.layers:
        ours, theirs = experts_module(moe, part, layer), experts_module(moe, whole, layer)
        assert same_bits(ours.gate_up_proj, theirs.gate_up_proj[2:4])
        assert same_bits(ours.down_proj, theirs.down_proj[2:4])
        assert ours.num_experts == 2
    dense = {n: p for n, p in part.state_dict().items() if ".experts." not in n}
    assert all(same_bits(tensor, whole.state_dict()[name]) for name, tensor in dense.items())


def test_no_tensor_of_an_absent_expert_is_read(
    moe: MoeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    read = Checkpoint.read_pieces

    def recorded(self: Checkpoint, pieces: Iterable[Piece]) -> dict[Piece, torch.Tensor]:
        wanted = list(pieces)
        asked.extend(name for name, _ in wanted)
        return read(self, wanted)

    monkeypatch.setattr(Checkpoint, "read_pieces", recorded)
    load_part(moe, range(2, 4), "auto")

    absent = {
        name
        for layer in moe.layers
        for expert in (0, 1, 4, 5)
        for name in moe.family.expert_tensor_names(layer, expert).values()
    }
    assert sorted(asked) == sorted(set(moe.checkpoint.tensors) - absent)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_type_is_the_one_that_transformers_chooses(
    tmp_path: Path, stored: torch.dtype, dtype: str
) -> None:
    from stages.model import load_model

    folder = save_tiny(tmp_path / "model", "mixtral", stored)

    found = load_part(MoeCheckpoint.open(folder), range(EXPERTS), dtype)

    expected = load_model(folder, dtype)
    assert {n: p.dtype for n, p in found.named_parameters()} == {
        n: p.dtype for n, p in expected.named_parameters()
    }


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_tiny(tmp_path / "model", "mixtral"))
    del moe.checkpoint.tensors["model.norm.weight"]

    with pytest.raises(CheckpointError, match=r"first model\.norm\.weight"):
        load_part(moe, range(EXPERTS), "auto")
