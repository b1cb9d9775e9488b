"""Names on disk and in memory, for every family, against what transformers writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.checkpoint import Checkpoint
from models.errors import CheckpointError, UnknownFamily
from models.families import FAMILIES, REFUSED, find_family
from tests.planted_families import STEMS
from tests.planted_families import tiny_config as tiny_config_of
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


@pytest.mark.parametrize(
    ("family", "key"), [("deepseek_v3", "n_routed_experts"), ("ernie4_5_moe", "moe_num_experts")]
)
def test_other_keys_count_experts_too(family: str, key: str) -> None:
    config = {key: 8, "num_local_experts": 8, "num_nextn_predict_layers": 1}

    smaller = FAMILIES[family].with_num_experts(config, 4)

    assert smaller == {key: 4, "num_local_experts": 4, "num_nextn_predict_layers": 0}
    assert FAMILIES[family].with_num_experts(config, 8) == config


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("switch_transformers", {}, 1),
        ("nllb-moe", {}, 2),
        ("ernie4_5_moe", {"moe_k": 6}, 6),
        ("hunyuan_v1_moe", {"moe_topk": [8, 8]}, 8),
    ],
)
def test_top_k_is_what_the_family_calls_it(
    family: str, config: dict[str, object], expected: int
) -> None:
    assert FAMILIES[family].top_k(config) == expected


def test_top_k_that_differs_between_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="moe_topk, the same for all layers"):
        FAMILIES["hunyuan_v1_moe"].top_k({"moe_topk": [8, 4]})


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_experts_are_where_the_plan_of_transformers_says(name: str) -> None:
    """Its configs name the modules that may be spread over ranks; encoder-decoders have none."""
    family, plan = FAMILIES[name], tiny_config_of(STEMS[name]).base_model_ep_plan or {}

    named = {key.removeprefix("layers.*.") for key in plan if ".experts" in key}

    storage = family.memory_experts
    names = ["experts", *storage.shapes(1, 1, 1)] if storage else []

    assert named == {f"{family.memory_block}.{each}" for each in names}


def test_decoder_layers_are_counted_behind_the_encoders() -> None:
    config = {"model_type": "switch_transformers", "num_layers": 12, "num_decoder_layers": 6}
    family = find_family(config)
    encoder = "encoder.block.11.layer.1.mlp.router.classifier.weight"
    decoder = "decoder.block.3.layer.2.mlp.router.classifier.weight"

    assert family.moe_layers([decoder, encoder, "shared.weight"]) == (11, 15)
    assert family.router_name(11) == encoder and family.router_name(15) == decoder
    assert family.layer_of("decoder.block.0.layer.0.layer_norm.weight") == 12
    assert family.layer_of("encoder.final_layer_norm.weight") is None
    assert family.expert_tensor_names(15, 2)["up"] == (
        "decoder.block.3.layer.2.mlp.experts.expert_2.wi.weight"
    )


def test_layers_behind_the_last_are_no_moe_layers() -> None:
    family = find_family({"model_type": "deepseek_v3", "num_hidden_layers": 61})
    names = [f"model.layers.{layer}.mlp.gate.weight" for layer in (3, 60, 61)]

    assert family.moe_layers(names) == (3, 60)
    assert [family.is_moe_tensor(name) for name in names] == [True, True, False]
    assert family.layer_of(names[2]) == 61


def test_a_model_without_a_depth_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no num_hidden_layers"):
        find_family({"model_type": "mixtral"})


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_that_cannot_be_taken_is_refused_with_the_reason(family: str) -> None:
    with pytest.raises(UnknownFamily) as refused:
        find_family({"model_type": family})

    assert refused.value.cause == f"{family} is not supported: {REFUSED[family]}"


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
