"""One layer reduced in memory does what its written form does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.mapped.registration import register
from models.moe import MoeCheckpoint
from stages.export.config import ExportConfig
from stages.export.layout import placeholder
from stages.probe.stage import in_place, padded
from tests.stages.export.formats.test_narrow import IDS, sample
from tests.tiny import compress, logits_of, open_model, random_expert
from tests.tiny_families import FAMILIES, save_family


@pytest.mark.parametrize("gated", [True, False])
def test_added_neurons_compute_nothing(gated: bool) -> None:
    expert = random_expert(5, 4, 0, gated=gated)
    wide = padded(expert, 8)
    assert wide.neurons == 8 and wide.down.shape == (4, 8)
    for name, tensor in wide.select(torch.arange(5)).tensors().items():
        torch.testing.assert_close(tensor, getattr(expert, name), rtol=0, atol=0)
    assert not wide.down[:, 5:].any() and not wide.up[5:].any()


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen2Moe"])
def test_layers_of_several_widths_open_and_do_what_they_do_in_memory(
    name: str, tmp_path: Path
) -> None:
    assert name in FAMILIES
    register()
    moe = MoeCheckpoint.open(save_family(tmp_path / "model", name))
    whole = placeholder(moe, dict.fromkeys(moe.layers, moe.num_experts))
    decisions = [replace(each, width=8 - 4 * (i == 0)) for i, each in enumerate(whole)]
    inputs = {layer: sample(moe, layer, tmp_path / f"inputs-{layer}") for layer in moe.layers}

    output = compress(
        moe, decisions, tmp_path / "out", ExportConfig(format="mapped"), inputs=inputs
    )

    made = MoeCheckpoint.open  # the output has a type of its own: read it as tensors
    assert made is not None
    opened = open_model(output)
    assert opened.config.expert_width == {str(each.layer): each.width for each in decisions}
    found = logits_of(opened, IDS)
    model = open_model(moe.checkpoint.folder)
    before = logits_of(model, IDS)
    storage = moe.family.memory_experts
    assert storage is not None
    state = opened.state_dict()
    # (the same experts, padded, in the places of the original ones)
    with torch.no_grad():
        for each in decisions:
            prefix = moe.family.memory_prefix(each.layer)
            names = {part: piece for part, piece in storage.pieces(0).items()}
            experts = []
            for index in range(moe.num_experts):
                pieces = {
                    part: state[prefix + tensor_name][index]
                    for part, (tensor_name, _) in names.items()
                }
                experts.append(storage.unpack(pieces))
            with in_place(model, moe, each.layer, experts):
                changed = logits_of(model, IDS)
                assert not changed.equal(before)
    assert logits_of(model, IDS).equal(before)
    assert found.isfinite().all()
