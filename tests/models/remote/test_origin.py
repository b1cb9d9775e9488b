"""A catalogue opens like the checkpoint that it stands for, and fetches only what is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import INDEX, Checkpoint
from models.errors import CheckpointError, StorageError
from models.moe import MoeCheckpoint
from models.remote.origin import catalogue
from stages.model import load_model
from stages.verify.stage import identity
from tests.tiny import logits_of, random_ids, save_tiny

FILES = 20


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of twenty files."""
    folder = save_tiny(tmp_path_factory.mktemp("sharded") / "model", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"part-{i % FILES:02d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(where.values())):
        part = {name: tensors[name] for name in where if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "merges.txt").write_text("a b\n")
    (folder / "README.md").write_text("not needed")
    return folder


@pytest.fixture
def opened(sharded: Path, tmp_path: Path) -> Checkpoint:
    """The same behind a URL, with a cache."""
    folder = catalogue(f"file://{sharded}", tmp_path / "fetched", str(tmp_path / "cache"))
    return Checkpoint.open(folder)


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))


def test_headers_are_enough_to_open(sharded: Path, opened: Checkpoint, tmp_path: Path) -> None:
    local = Checkpoint.open(sharded)
    assert (opened.tensors, opened.config, opened.files) == (
        local.tensors,
        local.config,
        local.files,
    )
    assert (opened.nbytes, opened.file_bytes) == (local.nbytes, local.file_bytes)
    assert cached(tmp_path) == []
    here = {path.name for path in opened.folder.iterdir() if not path.name.startswith(".")}
    assert {"config.json", INDEX, "merges.txt"} <= here and "README.md" not in here


def test_what_needs_two_of_twenty_files_fetches_two(
    sharded: Path, opened: Checkpoint, tmp_path: Path
) -> None:
    names = sorted(opened.tensors)
    wanted = [names[3], names[3 + FILES], names[7]]
    found = pickle.loads(pickle.dumps(opened)).read(wanted)  # as a unit that was sent to a worker
    assert cached(tmp_path) == ["part-03.safetensors", "part-07.safetensors"]
    expected = Checkpoint.open(sharded).read(wanted)
    assert all(torch.equal(found[name], expected[name]) for name in wanted)


def test_a_whole_model_opens_from_the_cache(
    sharded: Path, opened: Checkpoint, tmp_path: Path
) -> None:
    ids = random_ids(2, 8)
    assert torch.equal(
        logits_of(load_model(opened.folder, "auto"), ids),
        logits_of(load_model(sharded, "auto"), ids),
    )
    assert len(cached(tmp_path)) == FILES


def test_without_a_cache_weights_lie_beside_the_rest(sharded: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(catalogue(f"file://{sharded}", tmp_path, None))
    checkpoint.read([min(checkpoint.tensors)])
    assert [p.parent for p in tmp_path.rglob("part-*.safetensors") if p.parent.name != ".headers"]
    assert checkpoint.home(checkpoint.tensors) is None


def test_units_of_one_file_have_a_home_in_common(opened: Checkpoint) -> None:
    names = sorted(opened.tensors)
    home = opened.home([names[3]])
    assert home == opened.home([names[3 + FILES]]) != opened.home([names[4]])
    assert MoeCheckpoint.open(opened.folder).home(0) is not None


def test_a_copied_folder_is_the_same_model(sharded: Path, opened: Checkpoint) -> None:
    assert identity(opened) == identity(Checkpoint.open(sharded))


def test_a_changed_checkpoint_has_another_catalogue(sharded: Path, tmp_path: Path) -> None:
    url = f"file://{sharded}"
    before = catalogue(url, tmp_path / "a", None)
    assert catalogue(url, tmp_path / "a", None) == before
    file = sharded / "part-00.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert catalogue(url, tmp_path / "a", None) != before
    finally:
        file.write_bytes(data)


def test_a_variable_of_the_node_names_the_cache(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = catalogue(f"file://{sharded}", tmp_path / "fetched", "$NODE_DISK/cache")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(StorageError, match="a variable in it is not set on this node"):
        checkpoint.path("part-00.safetensors")
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    path = checkpoint.path("part-00.safetensors")
    assert path.is_relative_to(tmp_path / "disk" / "cache") and path.is_file()


def test_a_file_that_the_index_names_and_the_store_lacks(sharded: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sharded.iterdir():
        if path.name != "part-05.safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"part-05\.safetensors is missing at file://"):
        Checkpoint.open(catalogue(f"file://{copy}", tmp_path / "fetched", None))


def test_a_truncated_weight_file_is_noticed_by_its_header(sharded: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sharded.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    file = copy / "part-05.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is truncated: its header promises"):
        Checkpoint.open(catalogue(f"file://{copy}", tmp_path / "fetched", None))


def test_a_folder_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"there is pytorch_model\.bin"):
        catalogue(f"file://{tmp_path / 'store'}", tmp_path / "fetched", None)
