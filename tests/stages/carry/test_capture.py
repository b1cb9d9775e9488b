"""What a layer does with its experts' sum, for every family that is run layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.blocks import find_block
from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.streaming.model import LayerCall, StreamedModel
from stages.carry.capture import capturing, factor
from tests.tiny_families import FAMILIES, ragged, save_family

# Families that put a norm behind their experts (momentum: in the block of the released code).
NORMED = {"Afmoe", "Momentum"}


def last_layer(folder: Path) -> tuple[StreamedModel, LayerCall, nn.Module]:
    model = StreamedModel(Checkpoint.open(folder), "float32")
    index = max(i for i, layer in enumerate(model.layers) if find_block(layer) is not None)
    return model, model.calls(**ragged())[index], model.load(index)


def without_experts(call: LayerCall, layer: Any, scale: float) -> Tensor:
    """The layer's output, less `scale` times what its experts add up to."""
    found = find_block(layer)
    assert found is not None
    rows = torch.arange(call.hidden.shape[0] * call.hidden.shape[1])
    with capturing(found, rows, everywhere=True) as seen:
        behind = call.run(layer, call.hidden)
    return behind - scale * seen[0].made.view_as(behind)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NORMED))
def test_a_layer_is_its_experts_sum_times_a_factor_and_a_rest(family: str, tmp_path: Path) -> None:
    _, call, layer = last_layer(save_family(tmp_path, family))
    found = find_block(layer)
    assert found is not None
    with torch.inference_mode():
        rest = without_experts(call, layer, factor(layer, found, call, family))
        for name, tensor in found.experts.named_parameters():
            if "down" in name:
                tensor.zero_()
        assert torch.allclose(call.run(layer, call.hidden), rest, atol=1e-4, rtol=1e-4)


def test_the_factor_of_a_family_that_has_one_is_found(tmp_path: Path) -> None:
    config = save_family(tmp_path, "GraniteMoe") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"residual_multiplier": 0.25}))
    _, call, layer = last_layer(tmp_path)
    found = find_block(layer)
    assert found is not None
    assert factor(layer, found, call, "layer 2") == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("family", sorted(NORMED))
def test_a_norm_behind_the_experts_is_refused_with_numbers(family: str, tmp_path: Path) -> None:
    _, call, layer = last_layer(save_family(tmp_path, family))
    found = find_block(layer)
    assert found is not None
    with pytest.raises(CheckpointError, match=r"more than to scale.*a rest of \d") as refused:
        factor(layer, found, call, "layer 2 of afmoe")
    assert "refit.target=original" in str(refused.value)


def test_experts_that_run_on_some_tokens_give_those_the_same(tmp_path: Path) -> None:
    _, call, layer = last_layer(save_family(tmp_path, "Qwen2Moe"))
    found = find_block(layer)
    assert found is not None
    rows, passes = torch.tensor([1, 5, 20]), []
    with torch.inference_mode():
        for everywhere in (True, False):
            with capturing(found, rows, everywhere=everywhere) as seen:
                behind = call.run(layer, call.hidden).flatten(0, 1)
            passes.append((seen[0], behind))
    (whole, there), (some, here) = passes
    for name in ("hidden", "ids", "gates"):
        assert getattr(whole, name).equal(getattr(some, name))
    assert torch.allclose(whole.made, some.made, atol=1e-6)
    assert torch.allclose(there[rows], here[rows], atol=1e-6)
    assert not torch.allclose(there, here, atol=1e-3)
