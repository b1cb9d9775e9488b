"""Weight files that are damaged, missing or of another kind."""

from __future__ import annotations

import json
import shutil
import struct

import pytest

from tests.orchestrator.refusals import Damage, assert_refused
from tests.orchestrator.tiny_run import (
    Command,
    Inputs,
)


def raw_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def cut(inputs: Inputs) -> None:
    inputs.weights.write_bytes(inputs.weights.read_bytes()[:-100])


def lengthen(inputs: Inputs) -> None:
    inputs.weights.write_bytes(inputs.weights.read_bytes() + b"\0" * 100)


def header_of_unknown_type(inputs: Inputs) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}
    inputs.weights.write_bytes(raw_header(json.dumps({"x": entry}).encode(), b"\0" * 4))


def header_whose_shape_disagrees(inputs: Inputs) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
    inputs.weights.write_bytes(raw_header(json.dumps({"x": entry}).encode(), b"\0" * 4))


def only_pickles(inputs: Inputs) -> None:
    inputs.weights.unlink()
    (inputs.model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


FILES: dict[str, tuple[Damage, list[str]]] = {
    "no weights": (lambda i: i.weights.unlink(), ["holds neither model.safetensors nor"]),
    "only pickles": (only_pickles, ["convert it to safetensors", "pickle files are never opened"]),
    "truncated": (cut, ["is truncated", "bytes, the file has"]),
    "too long": (lengthen, ["is too long", "bytes, the file has"]),
    "empty": (lambda i: i.weights.write_bytes(b""), ["(0 bytes) has no safetensors header"]),
    "garbage": (lambda i: i.weights.write_bytes(b"\xff" * 200), ["(200 bytes) has no safetensors"]),
    "header not JSON": (
        lambda i: i.weights.write_bytes(raw_header(b"{nonsense")),
        ["has no safetensors header", "download the file again"],
    ),
    "header a list": (
        lambda i: i.weights.write_bytes(raw_header(b"[1, 2]")),
        ["has no safetensors header", "download the file again"],
    ),
    "header with text for numbers": (header_of_unknown_type, ["header entry of x is malformed"]),
    "shape against bytes": (header_whose_shape_disagrees, ["x 4 bytes", "[2] takes 8"]),
    "no folder": (lambda i: shutil.rmtree(i.model), ["no checkpoint folder at", "model.path"]),
    "no config": (lambda i: (i.model / "config.json").unlink(), ["config.json is missing"]),
    "config not JSON": (
        lambda i: (i.model / "config.json").write_text("{'hidden_size': 32}"),
        ["config.json is not JSON"],
    ),
    "config not text": (
        lambda i: (i.model / "config.json").write_bytes(b"\xff\xfe\x00"),
        ["config.json is not JSON"],
    ),
    "config a list": (
        lambda i: (i.model / "config.json").write_text("[]"),
        ["must hold a JSON object, not a list"],
    ),
    "no tokenizer": (
        lambda i: [path.unlink() for path in i.model.glob("tokenizer*")],
        ["holds no tokenizer", "set `model.tokenizer`"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_folder_is_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    damage, fragments = FILES[name]
    recipe = inputs.recipe()
    damage(inputs)
    assert_refused(coalesce, inputs, recipe, *fragments)


def test_a_file_in_place_of_the_folder_is_refused(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe(model__path=str(inputs.weights))
    assert_refused(coalesce, inputs, recipe, "no checkpoint folder at")


def test_a_hub_name_that_cannot_be_had_is_refused(
    coalesce: Command, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = inputs.recipe(model__path="nobody/no-such-model")
    assert_refused(
        coalesce, inputs, recipe, "nobody/no-such-model is no local folder", "set `model.path`"
    )
