"""What a router would choose, compared with what it did choose in the running model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.blocks import find_blocks
from models.moe import MoeCheckpoint
from models.routing import route
from tests.tiny import random_ids
from tests.tiny_families import FAMILIES, VOCABULARY, save_family


def choices_of(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Layer -> hidden [T, H], ids [T, k] and gates [T, k] that the experts were called with."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    hooks = [
        found.experts.register_forward_pre_hook(
            lambda _module, args, layer=layer: seen.update({layer: args})
        )
        for layer, found in find_blocks(model).items()
    ]
    with torch.inference_mode():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_the_router_chooses_as_in_the_running_model(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    moe = MoeCheckpoint.open(save_family(tmp_path, name))
    model = AutoModelForCausalLM.from_pretrained(moe.checkpoint.folder, dtype="float32").eval()
    seen = choices_of(model, random_ids(2, 9, seed=1, vocabulary=VOCABULARY))

    assert set(seen) == set(moe.layers)
    for layer, (hidden, ids, gates) in seen.items():
        routers = moe.checkpoint.read(moe.router_names(layer))
        found, weights = route(moe, moe.checkpoint.config, layer, routers, hidden)
        assert found.equal(ids)
        torch.testing.assert_close(weights, gates.float(), rtol=1e-5, atol=1e-6)


def test_a_router_with_fewer_rows_chooses_among_them(tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_family(tmp_path, "Mixtral"))
    layer = moe.layers[0]
    rows = moe.read_router(layer)[[0, 2, 3]]
    hidden = torch.randn(20, rows.shape[1], generator=torch.Generator().manual_seed(0))
    config = moe.family.with_num_experts(moe.checkpoint.config, 3)

    ids, gates = route(moe, config, layer, {moe.family.router_name(layer): rows}, hidden)

    probabilities = (hidden @ rows.float().T).softmax(dim=-1)
    expected, order = probabilities.topk(2)
    assert ids.equal(order)
    torch.testing.assert_close(gates, expected / expected.sum(dim=-1, keepdim=True))
