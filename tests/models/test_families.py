"""Names on disk and in memory, for every family, against what transformers writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.checkpoint import Checkpoint
from models.errors import CheckpointError, UnknownFamily
from models.families import FAMILIES, find_family
from tests.tiny import EXPERTS, MOE_LAYERS, TOP_K, save_tiny, tiny_config, tiny_model
from tests.tiny import FAMILIES as TINY


@pytest.fixture(scope="module", params=TINY)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    return Checkpoint.open(save_tiny(tmp_path_factory.mktemp(request.param), request.param))


def test_the_family_counts_experts_and_top_k_from_the_saved_config(checkpoint: Checkpoint) -> None:
    family = find_family(checkpoint.config)

    assert family.num_experts(checkpoint.config) == EXPERTS
    assert family.top_k(checkpoint.config) == TOP_K


def test_moe_layers_are_those_that_have_a_router(checkpoint: Checkpoint) -> None:
    family = find_family(checkpoint.config)

    assert family.moe_layers(checkpoint.tensors) == MOE_LAYERS[family.model_type]


def test_expert_names_are_the_ones_transformers_writes(checkpoint: Checkpoint) -> None:
    family = find_family(checkpoint.config)
    named = {
        name
        for layer in family.moe_layers(checkpoint.tensors)
        for expert in range(EXPERTS)
        for name in family.expert_tensor_names(layer, expert).values()
    }
    routers = {family.router_name(layer) for layer in family.moe_layers(checkpoint.tensors)}

    assert {n for n in checkpoint.tensors if family.is_moe_tensor(n)} == named | routers


def test_memory_names_of_dense_tensors_are_those_of_the_model(checkpoint: Checkpoint) -> None:
    family = find_family(checkpoint.config)
    in_memory = set(tiny_model(family.model_type).state_dict())

    dense = [n for n in checkpoint.tensors if not family.is_moe_tensor(n)]

    assert {family.memory_name(name) for name in dense} <= in_memory


def test_a_shared_expert_belongs_to_the_dense_rest() -> None:
    family = FAMILIES["qwen2_moe"]

    assert not family.is_moe_tensor("model.layers.0.mlp.shared_expert.up_proj.weight")
    assert not family.is_moe_tensor("model.layers.0.mlp.shared_expert_gate.weight")
    assert family.is_moe_tensor("model.layers.0.mlp.gate.weight")


def test_the_config_with_fewer_experts_opens_with_fewer_experts(checkpoint: Checkpoint) -> None:
    family = find_family(checkpoint.config)

    smaller = family.with_num_experts(checkpoint.config, 3)

    assert family.num_experts(smaller) == 3
    kind = type(tiny_config(family.model_type))
    count = "num_local_experts" if family.model_type == "mixtral" else "num_experts"
    assert getattr(kind.from_dict(smaller), count) == 3


def test_fewer_experts_leave_the_rest_of_the_config_alone() -> None:
    family = FAMILIES["olmoe"]
    config = {"model_type": "olmoe", "num_experts": 8, "hidden_size": 4}

    assert family.with_num_experts(config, 2) == config | {"num_experts": 2}


def test_an_unknown_family_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownFamily, match="did you mean qwen3_moe"):
        find_family({"model_type": "qwen3_mo"})


def test_a_config_without_a_model_type_is_refused() -> None:
    with pytest.raises(UnknownFamily, match="None"):
        find_family({})


def test_a_config_that_counts_no_experts_is_refused() -> None:
    with pytest.raises(CheckpointError, match="num_local_experts, num_experts"):
        FAMILIES["mixtral"].num_experts({"num_experts": "8"})


def test_a_config_without_top_k_is_refused() -> None:
    with pytest.raises(CheckpointError, match="num_experts_per_tok"):
        FAMILIES["mixtral"].top_k({})


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.input_layernorm.weight", 12),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.layers.x.weight", None),
    ],
)
def test_layer_of_reads_the_decoder_layer(name: str, layer: int | None) -> None:
    assert FAMILIES["mixtral"].layer_of(name) == layer


def test_saved_files_are_found(checkpoint: Checkpoint) -> None:
    assert checkpoint.files == ("model.safetensors",)
    assert isinstance(checkpoint.folder, Path)
