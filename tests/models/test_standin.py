"""A checkpoint of holes has the names, shapes and sizes of the one that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from models.standin import write_stand_in
from tests.tiny_families import FAMILIES, save_family


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_names_shapes_and_bytes_are_those_of_the_real_files(name: str, tmp_path: Path) -> None:
    real = save_family(tmp_path / "real", name)
    standing = write_stand_in(real, tmp_path / "standing", "float32")
    wanted, found = Checkpoint.open(real), Checkpoint.open(standing)
    assert {n: i.shape for n, i in found.tensors.items()} == {
        n: i.shape for n, i in wanted.tensors.items()
    }
    assert found.nbytes == wanted.nbytes
    assert MoeCheckpoint.open(standing).layers == MoeCheckpoint.open(real).layers


def test_it_takes_no_room(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    MixtralConfig(architectures=["MixtralForCausalLM"], dtype="bfloat16").save_pretrained(tmp_path)
    file = write_stand_in(tmp_path, tmp_path / "standing") / "model.safetensors"
    assert file.stat().st_size > 93e9
    assert file.stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ('{"model_type": "mixtral", "dtype": "int3"}', "int3"),
        (
            '{"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": "wide"}',
            "makes no mixtral model",
        ),
    ],
)
def test_what_makes_no_model_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        write_stand_in(tmp_path, tmp_path / "standing")
    assert not (tmp_path / "standing").exists()


def test_the_type_is_what_the_config_says(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    tiny = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    MixtralConfig(architectures=["MixtralForCausalLM"], **tiny).save_pretrained(tmp_path)
    for dtype in ("bfloat16", "float32"):
        config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": dtype}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = Checkpoint.open(write_stand_in(tmp_path, tmp_path / dtype))
        stored = "BF16" if dtype == "bfloat16" else "F32"
        assert {info.dtype for info in found.tensors.values()} == {stored}
