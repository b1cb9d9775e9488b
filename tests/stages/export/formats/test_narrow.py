"""Narrow experts of every family: the mapped form opens and does what the plain layers do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.errors import CheckpointError
from models.mapped.registration import register
from models.moe import MoeCheckpoint
from models.skeleton import check_width
from models.tensors import write_tensors
from stages.align.config import AlignConfig
from stages.export.config import ExportConfig
from stages.export.layout import file_layouts, placeholder
from stages.merge.config import MergeConfig
from stages.refit.config import RefitConfig
from stages.transform.stage import plan, run_one
from tests.tiny import compress, logits_of, open_model, random_ids
from tests.tiny_families import FAMILIES, VOCABULARY, save_family

WIDTH = 8
IDS = random_ids(2, 7, seed=3, vocabulary=VOCABULARY)


def sample(moe: MoeCheckpoint, layer: int, path: Path) -> tuple[Path, str]:
    """Random inputs with random routing, as the calibration would have stored them."""
    generator = torch.Generator().manual_seed(layer)
    gates, ids = torch.randn(200, moe.num_experts, generator=generator).topk(moe.top_k)
    places = torch.arange(200)
    tensors = {
        "hidden": torch.randn(200, moe.hidden_size, generator=generator),
        "ids": ids,
        "gates": gates.softmax(dim=-1),
        "logits": torch.zeros(200, moe.num_experts),
        "block": places,
        "position": places.int(),
        "domain": torch.zeros(200, dtype=torch.int32),
    }
    write_tensors(path, tensors, {"layer": layer, "domains": ["any"], "seed": 0, "inputs": {}})
    return path, "digest"


def narrow_logits(moe: MoeCheckpoint, folder: Path, form: str) -> Tensor:
    whole = placeholder(moe, dict.fromkeys(moe.layers, moe.num_experts))
    decisions = [replace(decision, width=WIDTH) for decision in whole]
    export = ExportConfig(format=form)
    inputs = {layer: sample(moe, layer, folder / f"inputs-{layer}") for layer in moe.layers}
    output = compress(moe, decisions, folder, export, inputs=inputs)
    promised = sum(each.tensor_bytes for each in file_layouts(moe, decisions, export))
    assert 0 <= (output / "model.safetensors").stat().st_size - promised < 60_000  # the header
    return logits_of(open_model(output), IDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_narrow_form(name: str, tmp_path: Path) -> None:
    register()
    moe = MoeCheckpoint.open(save_family(tmp_path / "model", name))

    mapped = narrow_logits(moe, tmp_path / "mapped", "mapped")

    assert mapped.isfinite().all()
    try:
        check_width(moe, WIDTH)
    except CheckpointError as error:  # the family ties the width of other modules to it
        assert "alone" in str(error)
        return
    native = narrow_logits(moe, tmp_path / "native", "native")
    torch.testing.assert_close(mapped, native, rtol=1e-4, atol=1e-5)


def two_domains(moe: MoeCheckpoint, layer: int, path: Path) -> tuple[Path, str]:
    """The same sample with its tokens in two domains, in turn."""
    found, digest = sample(moe, layer, path)
    tensors = load_file(found)
    tensors["domain"] = (torch.arange(200) % 2).int()
    write_tensors(path, tensors, {"layer": layer, "domains": ["a", "b"], "seed": 0, "inputs": {}})
    return found, digest


def narrowed(moe: MoeCheckpoint, folder: Path, task: dict[str, float] | None) -> dict[str, Tensor]:
    layer = moe.layers[0]
    (decision,) = placeholder(moe, {layer: moe.num_experts} | dict.fromkeys(moe.layers, 4))[:1]
    decisions, export = [replace(decision, width=WIDTH)], ExportConfig()
    layouts = [each for each in file_layouts(moe, decisions, export) if each.layer == layer]
    (unit,) = plan(
        moe,
        decisions,
        layouts,
        align=AlignConfig(),
        merge=MergeConfig(),
        export=export,
        folder=folder,
        model="fingerprint",
        refit=RefitConfig(enabled=True),
        inputs={layer: two_domains(moe, layer, folder / "inputs")},
        task=task,
    )
    run_one(unit)
    return load_file(unit.output)


def test_a_task_weighs_the_tokens_of_its_domains(tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_family(tmp_path / "model", "Mixtral"))

    tasks = (None, {"a": 3.0, "b": 3.0}, {"a": 1.0}, {"b": 1.0})
    plain, even, one, other = (
        narrowed(moe, tmp_path / str(number), task) for number, task in enumerate(tasks)
    )

    name = moe.family.expert_tensor_names(moe.layers[0], 0)["down"]
    torch.testing.assert_close(even[name], plain[name], rtol=1e-4, atol=1e-6)
    assert not one[name].allclose(other[name])
    assert not one[name].allclose(plain[name])
