"""Files that are written a tensor at a time are those that are written at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.tensors import filling, write_tensors
from stages.recover.layers import by_layer, largest_layer, layer_of
from stages.recover.written import overwriting
from tests.tiny import PROPERTY, same_bits, save_tiny

SHAPES = st.dictionaries(
    st.text("ab./é", min_size=1, max_size=5),
    st.lists(st.integers(0, 4), max_size=3),
    min_size=1,
    max_size=6,
)


@PROPERTY
@given(SHAPES, st.integers(0, 9))
def test_in_any_order_it_is_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("filled")
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    metadata = {"step": seed, "fingerprint": "é"}
    write_tensors(folder / "once", tensors, metadata)
    names = list(shapes)
    random.Random(seed).shuffle(names)
    with filling(folder / "filled", shapes, metadata) as put:
        for name in names:
            put(name, tensors[name])
    assert (folder / "once").read_bytes() == (folder / "filled").read_bytes()


def test_nothing_appears_where_a_tensor_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), filling(tmp_path / "f", {"a": [2], "b": [1]}, {}) as put:
        put("a", torch.zeros(2))
    assert not list(tmp_path.iterdir())


def test_only_what_is_put_changes_and_other_files_are_linked(tmp_path: Path) -> None:
    save_tiny(tmp_path / "student", "mixtral", torch.bfloat16)
    every = load_file(tmp_path / "student" / "model.safetensors")
    layers = {name: name.partition("layers.")[2][:1] or "rest" for name in every}
    (tmp_path / "student" / "model.safetensors").unlink()
    weights = {}
    for layer in set(layers.values()):
        file = f"{layer}.safetensors"
        part = {name: tensor for name, tensor in every.items() if layers[name] == layer}
        save_file(part, tmp_path / "student" / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(part, file)
    write_index(tmp_path / "student", weights)
    student = Checkpoint.open(tmp_path / "student")
    targets = {file: tmp_path / "new" / file for file in student.files}
    name = next(name for name in every if "layers.1." in name and "experts.2." in name)
    with overwriting(student, targets) as put:
        put({name: torch.full_like(every[name], 3)})
    for file, target in targets.items():
        old = tmp_path / "student" / file
        assert target.samefile(old) == (file != weights[name])
        for each, tensor in load_file(target).items():
            expected = torch.full_like(tensor, 3) if each == name else every[each]
            assert same_bits(tensor, expected), each


def test_a_value_that_is_no_number_leaves_no_file(tmp_path: Path) -> None:
    save_tiny(tmp_path / "student", "mixtral")
    student = Checkpoint.open(tmp_path / "student")
    name, info = next(iter(student.tensors.items()))
    target = tmp_path / "new" / "model.safetensors"
    wrong = torch.full(info.shape, float("nan"))
    with (
        pytest.raises(CheckpointError, match="not finite"),
        overwriting(student, {"model.safetensors": target}) as put,
    ):
        put({name: wrong})
    assert not target.exists()


def write_index(folder: Path, weights: dict[str, str]) -> None:
    from models.atomic import write_json
    from models.checkpoint import INDEX

    write_json(folder / INDEX, {"metadata": {}, "weight_map": weights})


def test_layers_come_one_by_one() -> None:
    names = ["model.embed.weight", "model.layers.0.a", "model.layers.0.b.3.c", "model.layers.10.a"]
    values = [(name, torch.zeros(1)) for name in [*names, "model.norm.weight", "head.weight"]]
    assert [sorted(found) for found in by_layer(values)] == [
        names[:1],
        names[1:3],
        names[3:],
        ["model.norm.weight"],
        ["head.weight"],
    ]
    assert layer_of("encoder.block.3.layer.1.mlp") == "encoder.block.3"
    assert largest_layer({"a.1.x": 2, "a.1.y": 3, "a.2.x": 4, "z": 1}) == 5
