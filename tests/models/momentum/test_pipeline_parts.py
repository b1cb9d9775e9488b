"""Streamed and observed, a momentum model does and says what it does as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.blocks import find_blocks
from models.checkpoint import Checkpoint
from models.streaming.model import StreamedModel
from stages.calibrate.observer import Observer
from tests import tiny_momentum
from tests.tiny import same_bits
from tests.tiny_families import ragged
from tests.tiny_momentum import STYLES, VARIANTS


@torch.inference_mode()
def streamed(
    model: StreamedModel, inputs: dict[str, Tensor]
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Logits, and the shape of what every layer handed on."""
    calls = model.calls(**inputs)
    hidden, shapes = calls[0].hidden, []
    for index, call in enumerate(calls):
        with model.layer(index) as layer:
            hidden = call.run(layer, hidden)
        shapes.append(tuple(hidden.shape))
    return model.logits(hidden, **inputs), shapes


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", VARIANTS)
def test_momentum_is_carried_from_layer_to_layer(name: str, style: str, tmp_path: Path) -> None:
    model = tiny_momentum.model(block_style=style, dense_layers=[1], **VARIANTS[name])
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = model(use_cache=False, **ragged()).logits
    real = ragged()["attention_mask"]

    found, shapes = streamed(StreamedModel(Checkpoint.open(tmp_path)), ragged())

    batch, parts = tuple(real.shape), 2 if name == "complex" else 1
    assert shapes == [(*batch, 1 + parts, 32), (*batch, 1 + parts, 32), (*batch, 32)]
    assert same_bits(found[real], expected[real])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["heavy_ball", "robust", "nag"])
@torch.inference_mode()
def test_what_is_recorded_is_what_the_router_read(name: str, style: str) -> None:
    """With look-ahead that is y = x + alpha gamma p, which no residual stream holds."""
    model = tiny_momentum.model(block_style=style, **VARIANTS[name])
    read: dict[int, Tensor] = {}
    passed: dict[int, tuple[Tensor, ...]] = {}
    for layer, block in find_blocks(model).items():
        block.router.register_forward_pre_hook(lambda _, args, at=layer: read.update({at: args[0]}))
        step: Any = model.model.layers[layer].momentum
        step.register_forward_pre_hook(lambda _, args, at=layer: passed.update({at: args}))
    inputs = ragged()
    keep = inputs["attention_mask"].reshape(-1)
    with Observer(model).observe(inputs["attention_mask"]) as seen:
        model(use_cache=False, **inputs)

    rates = model.config.rates
    for layer, routed in seen.items():
        assert same_bits(routed.inputs, read[layer].reshape(-1, 32)[keep])
        hidden, _, momentum = passed[layer]
        looked = hidden + rates.look_ahead * rates.gamma * momentum[:, :, 0]
        if style == "pre_ln":
            looked = model.model.layers[layer].post_attention_layernorm(looked)
        torch.testing.assert_close(routed.inputs, looked.reshape(-1, 32)[keep])
    assert len(seen) == 3
