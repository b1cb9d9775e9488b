"""Final norm and head alone: the same logits token by token, with a gradient for the stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.checkpoint import Checkpoint
from models.streaming.model import StreamedModel
from tests.tiny_families import ragged, save_family


@pytest.mark.parametrize("family", ["Mixtral", "GraniteMoe", "DeepseekV3", "Momentum", "GptOss"])
def test_tokens_on_their_own_get_the_logits_they_get_in_a_text(family: str, tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint.open(save_family(tmp_path, family)), "float32")
    call = model.calls(**ragged())[-1]
    hidden = torch.randn(call.hidden.shape, generator=torch.Generator().manual_seed(0))
    real = ragged()["attention_mask"].bool()
    expected = model.logits(hidden, **ragged())[real]
    stream = hidden[real].clone().requires_grad_()

    found = model.head(stream)
    found.square().sum().backward()

    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
    assert stream.grad is not None and bool(stream.grad.any(dim=1).all())
    assert all(parameter.grad is None for parameter in model.model.parameters())
