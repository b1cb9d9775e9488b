"""An index that does not fit its files, or leads out of the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.orchestrator.refusals import Damage, assert_refused
from tests.orchestrator.tiny_run import (
    Command,
    Inputs,
)


def index_with(inputs: Inputs, file: str) -> None:
    index = inputs.split()
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(values))


def outside(inputs: Inputs) -> Path:
    """A well-formed weight file beside the checkpoint folder."""
    path = inputs.root / "secret.safetensors"
    if inputs.weights.exists():
        shutil.copyfile(inputs.weights, path)
    return path


def linked_out(inputs: Inputs) -> None:
    target = outside(inputs)
    inputs.weights.unlink()
    inputs.weights.symlink_to(target)


def promised_tensor(inputs: Inputs) -> None:
    index = inputs.split()
    values = json.loads(index.read_text())
    values["weight_map"]["model.ghost.weight"] = "part-1.safetensors"
    index.write_text(json.dumps(values))


def unlisted_tensor(inputs: Inputs) -> None:
    index = inputs.split()
    values = json.loads(index.read_text())
    del values["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(values))


INDEX: dict[str, tuple[Damage, list[str]]] = {
    "a parent folder": (
        lambda i: (outside(i), index_with(i, "../secret.safetensors")),
        ["names '../secret.safetensors', a file outside the checkpoint folder"],
    ),
    "an absolute path": (
        lambda i: index_with(i, str(outside(i))),
        ["secret.safetensors', a file outside the checkpoint folder"],
    ),
    "a link out": (linked_out, ["outside the checkpoint folder", "model.allow_links=true"]),
    "a folder": (lambda i: index_with(i, "."), ["is not a file"]),
    "a missing file": (
        lambda i: index_with(i, "part-9.safetensors"),
        ["part-9.safetensors is missing", "download"],
    ),
    "a promised tensor": (
        promised_tensor,
        ["promises model.ghost.weight in part-1.safetensors, which does not hold it"],
    ),
    "an unlisted tensor": (unlisted_tensor, ["1 tensors are not in the index", "lm_head.weight"]),
    "another file": (
        lambda i: index_with(i, "part-2.safetensors"),
        ["promises lm_head.weight in part-2.safetensors, which does not hold it"],
    ),
    "not JSON": (lambda i: i.split().write_text("oops"), ["index.json is not JSON"]),
    "no map": (lambda i: i.split().write_text("{}"), ["has no weight_map"]),
}


@pytest.mark.parametrize("name", INDEX)
def test_an_index_that_does_not_fit_is_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    damage, fragments = INDEX[name]
    recipe = inputs.recipe()
    damage(inputs)
    assert_refused(coalesce, inputs, recipe, *fragments)


def test_a_sharded_checkpoint_is_accepted(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe()
    inputs.split()
    assert coalesce("validate", recipe).code == 0


def test_links_of_a_hub_cache_are_accepted(coalesce: Command, inputs: Inputs) -> None:
    repository = inputs.root / "cache" / "models--someone--tiny"
    snapshot_folder, blobs = repository / "snapshots" / "0a1b2c", repository / "blobs"
    snapshot_folder.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(inputs.model.iterdir())):
        shutil.move(path, blobs / f"sha{number}")
        (snapshot_folder / path.name).symlink_to(Path("../../blobs") / f"sha{number}")
    recipe = inputs.recipe(model__path=str(snapshot_folder))
    assert coalesce("validate", recipe, "--deep").code == 0


def test_a_link_that_leads_out_is_followed_when_allowed(coalesce: Command, inputs: Inputs) -> None:
    linked_out(inputs)
    recipe = inputs.recipe(model__allow_links=True)
    assert coalesce("validate", recipe, "--deep").code == 0
