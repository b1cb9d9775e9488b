"""MoE blocks are found in models of every family, by structure alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from models.blocks import find_block, find_blocks, model_layers
from models.errors import CheckpointError
from tests.tiny_families import FAMILIES, family_model, ragged

# Dense first layers, periods, lists of layers; all others have a block in each of three layers.
SPARSE = {
    "Qwen3Moe": (0, 2),
    "DeepseekV2": (1, 2),
    "DeepseekV3": (1, 2),
    "Glm4Moe": (1, 2),
    "Ernie4_5_Moe": (1, 2),
    "Jamba": (1,),
    "Afmoe": (1, 2),
    "Lfm2Moe": (1, 2),
    "Momentum": (0, 2),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_routers_give_what_experts_are_called_with(family: str) -> None:
    """Logits `[T, E]`, weights and ids `[T, k]` come out of one module and go into the other."""
    model = family_model(family)
    blocks = find_blocks(model)
    said: dict[int, Any] = {}
    given: dict[int, Any] = {}
    for layer, found in blocks.items():
        found.router.register_forward_hook(lambda _m, _a, out, i=layer: said.update({i: out}))
        found.experts.register_forward_pre_hook(lambda _m, args, i=layer: given.update({i: args}))

    model(use_cache=False, **ragged())

    assert tuple(blocks) == SPARSE.get(family, (0, 1, 2)) == tuple(said) == tuple(given)
    tokens = ragged()["input_ids"].numel()
    for layer, (logits, weights, ids) in said.items():
        hidden, chosen, gates = given[layer]
        assert logits.shape == (tokens, 4) and hidden.shape == (tokens, 32)
        assert chosen.shape == ids.shape == (tokens, 2) and chosen.equal(ids)
        assert gates.equal(weights)


def test_a_dense_layer_has_no_block() -> None:
    layers = model_layers(family_model("Qwen3Moe"))

    assert [find_block(layer) is None for layer in layers] == [False, True, False]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(2, 2), nn.Linear(2, 2)


def test_two_blocks_in_a_layer_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"2 MoE blocks \(Block, Block\)"):
        find_block(nn.ModuleList([Block(), Block()]))


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    base = nn.Module()
    base.first, base.second = nn.ModuleList([Block()]), nn.ModuleList([Block()])
    model = SimpleNamespace(base_model=base, config=SimpleNamespace(is_encoder_decoder=False))

    with pytest.raises(CheckpointError, match="2 lists of layers"):
        find_blocks(model)
