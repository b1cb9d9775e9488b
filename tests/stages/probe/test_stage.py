"""One layer reduced in memory does what its written form does."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.expert import Expert
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

    export = ExportConfig(format="mapped")
    opened = open_model(compress(moe, decisions, tmp_path / "out", export, inputs=inputs))

    assert opened.config.expert_width == {str(each.layer): each.width for each in decisions}
    state, model = opened.state_dict(), open_model(moe.checkpoint.folder)
    before = logits_of(model, IDS)
    with ExitStack() as stack:
        for each in decisions:
            experts = [stored(moe, each.layer, index, state) for index in range(moe.num_experts)]
            assert experts[0].neurons == each.width
            stack.enter_context(in_place(model, moe, each.layer, experts))
        torch.testing.assert_close(logits_of(model, IDS), logits_of(opened, IDS))
        assert not logits_of(model, IDS).allclose(before)
    assert logits_of(model, IDS).equal(before)


def stored(moe: MoeCheckpoint, layer: int, index: int, state: dict[str, Any]) -> Expert:
    """An expert as the model in memory holds it."""
    storage, prefix = moe.family.memory_experts, moe.family.memory_prefix(layer)
    assert storage is not None
    pieces = storage.pieces(index).items()
    return storage.unpack({part: state[prefix + name][index] for part, (name, _) in pieces})
