"""Momentum is carried beside the hidden state; what is mended is the hidden state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.blocks import find_block
from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.families import FAMILIES
from models.streaming.model import StreamedModel
from stages.carry.capture import factor
from stages.carry.stream import Stream
from tests import tiny_momentum
from tests.tiny_families import ragged
from tests.tiny_momentum import VARIANTS

LINEAR = ("heavy_ball", "robust", "nag", "complex", "learnable")


def first_factor(folder: Path, **fields: Any) -> float:
    """Of the first of three layers, which hands on momentum, probed on real calls."""
    tiny_momentum.model(**fields).save_pretrained(folder)
    model = StreamedModel(Checkpoint.open(folder), "float32")
    layer = model.load(0)
    found = find_block(layer)
    assert found is not None
    return factor(layer, found, model.calls(**ragged())[0], "layer 0 of momentum_smoe")


@pytest.mark.parametrize("name", LINEAR)
def test_the_experts_reach_the_hidden_state_times_the_step(name: str, tmp_path: Path) -> None:
    fields = VARIANTS[name] if name in ("robust", "learnable") else VARIANTS[name] | {"gamma": 0.8}
    step: Any = tiny_momentum.model(**fields).model.layers[0].momentum

    found = first_factor(tmp_path, **fields)

    assert found == pytest.approx(float(torch.as_tensor(step._gamma).detach()), rel=1e-4)
    assert name != "learnable" or found != pytest.approx(1.0, rel=1e-3)
    assert FAMILIES["momentum_smoe"].behind_experts(fields) is None


@pytest.mark.parametrize(
    "fields",
    [{"block_style": "post_ln"}, VARIANTS["adam"], VARIANTS["sign"]],
    ids=["post_ln", "adam", "sign"],
)
def test_what_no_factor_describes_is_refused_and_declared(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="more than to scale"):
        first_factor(tmp_path, **fields)
    assert FAMILIES["momentum_smoe"].behind_experts(fields) is not None


def test_a_stream_holds_both_and_starts_without_momentum(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "stream", [(2, 3), (1, 2)], 4, states=3)
    pair, embeddings = torch.randn(1, 2, 3, 4), torch.randn(2, 3, 4)

    stream.write(1, pair)
    stream.write(0, embeddings)

    assert stream.read(1).equal(pair)
    assert stream.read(0)[:, :, 0].equal(embeddings) and not stream.read(0)[:, :, 1:].any()
