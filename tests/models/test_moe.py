"""The expert grid of a checkpoint is complete, of one shape, and read as stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from tests.tiny import EXPERTS, FAMILIES, HIDDEN, MOE_LAYERS, WIDTH, save_tiny

Edit = Callable[[dict[str, Tensor]], None]
W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(tmp_path, request.param)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return save_tiny(tmp_path, "mixtral")


def edit(folder: Path, change: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_family_opens_with_its_dimensions(folder: Path) -> None:
    moe = MoeCheckpoint.open(folder)

    assert moe.layers == MOE_LAYERS[moe.family.model_type]
    assert (moe.num_experts, moe.top_k) == (EXPERTS, 2)


def test_experts_are_read_bit_for_bit(folder: Path) -> None:
    moe, stored = MoeCheckpoint.open(folder), load_file(folder / "model.safetensors")

    expert = moe.read_expert(moe.layers[-1], 4)

    names = moe.family.expert_tensor_names(moe.layers[-1], 4)
    for part, tensor in expert.tensors().items():
        assert tensor.equal(stored[names[part]])
    assert expert.up.shape == (WIDTH, HIDDEN)
    assert expert.down.shape == (HIDDEN, WIDTH)


def test_several_experts_come_in_the_order_asked_for(mixtral: Path) -> None:
    moe = MoeCheckpoint.open(mixtral)

    found = moe.read_experts(0, [5, 1])

    assert found[0].up.equal(moe.read_expert(0, 5).up)
    assert found[1].up.equal(moe.read_expert(0, 1).up)


def test_the_router_is_read_as_stored(folder: Path) -> None:
    moe, stored = MoeCheckpoint.open(folder), load_file(folder / "model.safetensors")

    assert moe.read_router(moe.layers[0]).equal(stored[moe.family.router_name(moe.layers[0])])


def test_every_tensor_lies_in_exactly_one_part(folder: Path) -> None:
    moe = MoeCheckpoint.open(folder)
    layers = sorted({int(n.split(".")[2]) for n in moe.checkpoint.tensors if ".layers." in n})

    parts = [moe.dense_names(layer) for layer in [*layers, None]]
    parts += [[moe.family.router_name(layer)] for layer in moe.layers]
    parts += [
        list(moe.family.expert_tensor_names(layer, expert).values())
        for layer in moe.layers
        for expert in range(moe.num_experts)
    ]

    assert sorted(name for part in parts for name in part) == sorted(moe.checkpoint.tensors)


def test_bytes_of_experts_and_layers(mixtral: Path) -> None:
    moe = MoeCheckpoint.open(mixtral)

    assert moe.expert_bytes(0) == 3 * HIDDEN * WIDTH * 4
    outside = 2 * 64 * HIDDEN * 4 + HIDDEN * 4  # embedding, head, final norm
    assert sum(moe.layer_bytes(layer) for layer in (0, 1)) + outside == moe.checkpoint.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(W1), "1 expert tensor.* missing, first .*experts.3.w1"),
        (lambda t: t.update({W1.replace(".3.", ".6."): t[W1].clone()}), "1 expert.* unexpected"),
        (lambda t: t.update({W1: t[W1][:-1].clone()}), r"has shape \[15, 32\].* \[16, 32\]"),
        (lambda t: t.update({W1: t[W1].to(torch.int8)}), "has dtype I8"),
        (lambda t: t.update({ROUTER: t[ROUTER][:5].clone()}), r"has shape \[5, 32\].* \[6, 32\]"),
    ],
    ids=["missing", "extra", "shape", "dtype", "router"],
)
def test_a_broken_expert_grid_is_refused(mixtral: Path, change: Edit, message: str) -> None:
    edit(mixtral, change)

    with pytest.raises(CheckpointError, match=message):
        MoeCheckpoint.open(mixtral)


@pytest.mark.parametrize("top_k", [0, 7])
def test_a_config_that_selects_no_or_too_many_experts_is_refused(mixtral: Path, top_k: int) -> None:
    config = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top_k}))

    with pytest.raises(CheckpointError, match=f"selects {top_k} of 6 experts"):
        MoeCheckpoint.open(mixtral)


def test_a_single_missing_router_is_refused(mixtral: Path) -> None:
    edit(mixtral, lambda t: t.update({"x": t.pop(ROUTER)}))

    with pytest.raises(CheckpointError, match=r"missing, first .*layers\.0.*gate\.weight"):
        MoeCheckpoint.open(mixtral)


def test_a_checkpoint_without_routers_is_refused(mixtral: Path) -> None:
    edit(mixtral, lambda t: [t.pop(n) for n in list(t) if n.endswith("gate.weight")] and None)

    with pytest.raises(CheckpointError, match="has no MoE layer"):
        MoeCheckpoint.open(mixtral)


def test_a_config_with_another_number_of_experts_is_refused(mixtral: Path) -> None:
    config = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))

    with pytest.raises(CheckpointError, match=r"12 expert tensor.* missing.*promises 8 experts"):
        MoeCheckpoint.open(mixtral)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size"])
def test_a_config_without_dimensions_is_refused(mixtral: Path, key: str) -> None:
    config = json.loads((mixtral / "config.json").read_text())
    del config[key]
    (mixtral / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=key):
        MoeCheckpoint.open(mixtral)
