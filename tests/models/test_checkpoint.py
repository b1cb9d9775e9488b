"""Headers tell the truth about a folder, and damage is found before a tensor is read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import INDEX, SINGLE, Checkpoint
from models.errors import CheckpointError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "steps": torch.tensor([3], dtype=torch.int64),
}


def write_single(folder: Path) -> Path:
    save_file(TENSORS, folder / SINGLE)
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return folder


def write_sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    save_file({"b": TENSORS["b"]}, folder / "one.safetensors")
    save_file({"a": TENSORS["a"]}, folder / "two.safetensors")
    mapping = weight_map or {"a": "two.safetensors", "b": "one.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": mapping}))
    (folder / "config.json").write_text("{}")
    return folder


def write_raw(folder: Path, header: bytes, body: bytes = b"") -> Path:
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + body)
    (folder / "config.json").write_text("{}")
    return folder


def test_headers_give_shape_dtype_and_bytes(tmp_path: Path) -> None:
    found = Checkpoint.open(write_single(tmp_path)).tensors

    assert list(found) == ["a", "b", "steps"]
    assert (found["a"].dtype, found["a"].shape, found["a"].nbytes) == ("BF16", (2,), 4)
    assert (found["b"].dtype, found["b"].shape, found["b"].nbytes) == ("F32", (2, 3), 24)


def test_bytes_and_parameters_are_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_single(tmp_path))

    assert checkpoint.nbytes == 24 + 4 + 8
    assert checkpoint.file_bytes == (tmp_path / SINGLE).stat().st_size
    assert checkpoint.parameters == 8  # the integer is no parameter


def test_reading_gives_what_was_stored(tmp_path: Path) -> None:
    found = Checkpoint.open(write_single(tmp_path)).read(["b", "a"])

    assert set(found) == {"a", "b"}
    assert found["a"].dtype == torch.bfloat16
    assert found["a"].equal(TENSORS["a"])
    assert found["b"].equal(TENSORS["b"])


def test_a_sharded_checkpoint_reads_across_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_sharded(tmp_path))

    assert checkpoint.files == ("one.safetensors", "two.safetensors")
    found = checkpoint.read(["a", "b"])
    assert found["a"].equal(TENSORS["a"])
    assert found["b"].equal(TENSORS["b"])


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor nothing is missing"):
        Checkpoint.open(write_single(tmp_path)).read(["nothing"])


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        Checkpoint.open(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is missing"), ("{", "is not JSON"), ("[1]", "must hold a JSON object, not a list")],
)
def test_a_bad_config_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    write_single(tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_truncated_file_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = write_single(tmp_path) / SINGLE
    size = path.stat().st_size
    os.truncate(path, size - 1)

    with pytest.raises(CheckpointError, match=f"truncated.*{size:,}.*{size - 1:,}"):
        Checkpoint.open(tmp_path)


def test_a_file_with_bytes_behind_its_end_is_refused(tmp_path: Path) -> None:
    path = write_single(tmp_path) / SINGLE
    path.write_bytes(path.read_bytes() + b"\0")

    with pytest.raises(CheckpointError, match="too long"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0\0", b"<html>not found</html>", bytes(64)])
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (write_single(tmp_path) / SINGLE).write_bytes(content)

    with pytest.raises(CheckpointError, match="no safetensors header"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("header", [b"5", b"[1, 2]", b'"text"', b"null"])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(CheckpointError, match="no safetensors header"):
        Checkpoint.open(write_raw(tmp_path, header))


@pytest.mark.parametrize(
    "entry",
    ['{"dtype": "F32"}', "7", '{"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}'],
)
def test_a_malformed_header_entry_is_refused(tmp_path: Path, entry: str) -> None:
    header = f'{{"x": {entry}}}'.encode()

    with pytest.raises(CheckpointError, match="header entry of x is malformed"):
        Checkpoint.open(write_raw(tmp_path, header, bytes(4)))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(CheckpointError, match="pickle files are never opened"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd"])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()

    with pytest.raises(CheckpointError, match="outside the checkpoint folder"):
        Checkpoint.open(write_sharded(folder, {"a": file, "b": "one.safetensors"}))


def test_a_link_out_of_the_folder_needs_permission(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (write_single(folder) / SINGLE).rename(tmp_path / "elsewhere")
    (folder / SINGLE).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match="allow_links"):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder, allow_links=True).nbytes == 36


def test_the_blob_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (write_single(snapshot) / SINGLE).rename(blobs / "0123")
    (snapshot / SINGLE).symlink_to(blobs / "0123")

    assert Checkpoint.open(snapshot).nbytes == 36


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    mapping = {"a": "two.safetensors", "b": "one.safetensors", "c": "one.safetensors"}

    with pytest.raises(CheckpointError, match=r"promises c in one\.safetensors"):
        Checkpoint.open(write_sharded(tmp_path, mapping))


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file(
        load_file(tmp_path / "one.safetensors") | {"z": torch.ones(1)},
        tmp_path / "one.safetensors",
    )

    with pytest.raises(CheckpointError, match=r"not in the index, e\.g\. z"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    (write_sharded(tmp_path) / "two.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, text: str) -> None:
    (write_sharded(tmp_path) / INDEX).write_text(text)

    with pytest.raises(CheckpointError, match="has no weight_map"):
        Checkpoint.open(tmp_path)
