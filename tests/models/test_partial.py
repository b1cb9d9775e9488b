"""A part of a model is the model itself with fewer experts, and reads no more than it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
from torch import nn

from models.blocks import find_blocks
from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.partial import is_needed, narrow
from models.streaming.model import StreamedModel
from tests.tiny import open_model, same_bits
from tests.tiny_families import save_family

# On disk: one tensor per expert; one for all; one for all, interleaved and with biases.
FAMILIES = ("Mixtral", "GraniteMoe", "GptOss")
EXPERTS, PARTS = 4, 2


def part_of(folder: Path, part: int) -> StreamedModel:
    """The model with half of its experts; every layer in memory."""
    share = EXPERTS // PARTS
    experts = range(part * share, (part + 1) * share)
    model = StreamedModel(Checkpoint.open(folder), experts=experts)
    for index in range(len(model.layers)):
        model.load(index)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_holds_its_experts_and_everything_dense(family: str, tmp_path: Path) -> None:
    whole = open_model(save_family(tmp_path, family))

    for part in range(PARTS):
        model = part_of(tmp_path, part).model

        for layer, found in find_blocks(model).items():
            theirs = dict(find_blocks(whole)[layer].experts.named_parameters())
            rows = slice(2 * part, 2 * part + 2)
            for name, tensor in found.experts.named_parameters():
                assert same_bits(tensor, theirs[name][rows]), name
        dense = {n: t for n, t in model.state_dict().items() if ".experts." not in n}
        assert dense.keys() == {n for n in whole.state_dict() if ".experts." not in n}
        assert all(same_bits(tensor, whole.state_dict()[name]) for name, tensor in dense.items())


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that were read of every tensor."""
    found: dict[str, int] = {}
    own = safetensors.safe_open

    class Slice:
        def __init__(self, name: str, tensor: Any) -> None:
            self._name, self._tensor = name, tensor

        def __getitem__(self, index: Any) -> Any:
            given = self._tensor[index]
            found[self._name] = found.get(self._name, 0) + given.nbytes
            return given

    class Counting:
        def __init__(self, *words: Any, **named: Any) -> None:
            self._file = own(*words, **named)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *words: Any) -> None:
            self._file.__exit__(*words)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self._file.get_slice(name))

    monkeypatch.setattr(safetensors, "safe_open", Counting)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_is_dense_and_a_share_of_the_experts(
    family: str, tmp_path: Path, read: dict[str, int]
) -> None:
    folder = save_family(tmp_path, family)
    tensors = Checkpoint.open(folder).tensors
    part_of(folder, 0)
    first = dict(read)
    read.clear()

    part_of(folder, 1)

    whole = {name: info.nbytes for name, info in tensors.items()}
    both = {name: (first.get(name, 0), read.get(name, 0)) for name in whole}
    dealt = {n for n in whole if ".experts." in n or "input_linear" in n or "output_linear" in n}
    assert dealt and {name for name in whole if sum(both[name]) == whole[name]} == dealt
    dense = {name for name in whole if both[name] == (whole[name], whole[name])}
    assert dense == set(whole) - dealt
    # To the byte: all that is dense, and half of the experts.
    experts = sum(whole[name] for name in dealt)
    assert sum(first.values()) == sum(read.values()) == sum(whole.values()) - experts // 2


def test_shared_experts_are_dense() -> None:
    assert is_needed("model.layers.0.mlp.shared_experts.up_proj.weight", range(2))
    assert is_needed("model.layers.0.mlp.experts.1.up_proj.weight", range(2))
    assert not is_needed("model.layers.0.mlp.experts.2.up_proj.weight", range(2))


def test_experts_in_modules_of_their_own_are_refused() -> None:
    layer, block = nn.Module(), nn.Module()
    layer.mlp, block.router = block, nn.Linear(2, 2)
    block.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(2, 2) for i in range(2)})

    with pytest.raises(CheckpointError, match="ModuleDict keeps its experts in modules"):
        narrow([layer], range(1))
