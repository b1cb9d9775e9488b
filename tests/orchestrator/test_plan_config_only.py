"""Plans of models whose weights are not there: exact sizes from config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.plan import standing_in
from orchestrator.load import load
from orchestrator.preflight import expected_layouts, prepare
from tests.orchestrator.tiny_run import Command, Inputs, snapshot

MIXTRAL_8X7B = 46_702_792_704
# google/switch-base-32: every second block of 12 + 12 is sparse.
SWITCH_BASE_32: dict[str, Any] = {
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "num_experts": 32,
    "d_model": 768,
    "d_ff": 3072,
    "num_heads": 12,
}


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    from transformers import MixtralConfig

    config = MixtralConfig(architectures=["MixtralForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path / "8x7b")
    return tmp_path / "8x7b"


def test_mixtral_8x7b_is_planned_without_its_weights(
    coalesce: Command, inputs: Inputs, mixtral: Path
) -> None:
    before = snapshot(inputs.root)
    recipe = inputs.recipe(model__path=str(mixtral), model__tokenizer=str(inputs.model))
    outcome = coalesce("plan", recipe, "--config-only")
    assert outcome.code == 0, outcome.err
    assert "32 MoE layers of 8 experts, top-2: 93.4 GB -> " in " ".join(outcome.out.split())
    assert "From config.json alone" in outcome.out
    assert set(snapshot(inputs.root)) - set(before) <= {"recipe.yaml"}


def test_a_machine_without_the_room_still_plans(
    coalesce: Command, inputs: Inputs, mixtral: Path
) -> None:
    """1,024 shards of 2,048 tokens, whose hidden states no disk here holds."""
    changes = {"model__path": str(mixtral), "model__tokenizer": str(inputs.model)}
    recipe = inputs.recipe(**changes, model__verify="headers", calibrate__engine="streaming")
    outcome = coalesce("plan", recipe, "--config-only", "calibrate.data.tokens=100000000000")
    assert outcome.code == 0, outcome.err
    assert "Not on this machine: " in outcome.out
    assert "are free" in " ".join(outcome.out.split())


def test_of_a_model_that_is_there_it_promises_the_same(coalesce: Command, inputs: Inputs) -> None:
    config = load(str(inputs.recipe())).config
    with standing_in(config) as imagined:
        found = prepare(imagined)
        sizes = [each.tensor_bytes for each in expected_layouts(found.variants[0], found.moe)]
    real = prepare(config)
    assert sizes == [each.tensor_bytes for each in expected_layouts(real.variants[0], real.moe)]


def test_without_the_option_missing_weights_are_refused(
    coalesce: Command, inputs: Inputs, mixtral: Path
) -> None:
    outcome = coalesce("plan", inputs.recipe(model__path=str(mixtral)))
    assert outcome.code == 2 and "holds neither model.safetensors" in outcome.err


def test_parameters_of_the_papers_models(inputs: Inputs, tmp_path: Path) -> None:
    """arXiv 2310.01334, table 2: 2.0 B, and 733 M where 11 of 12 sparse layers keep 8 of 32."""
    from transformers import SwitchTransformersConfig

    SwitchTransformersConfig(
        architectures=["SwitchTransformersForConditionalGeneration"], **SWITCH_BASE_32
    ).save_pretrained(tmp_path / "switch")
    recipe = inputs.recipe(
        model__path=str(tmp_path / "switch"),
        model__tokenizer=str(inputs.model),
        group={"method": "mc_smoe", "budget": {"experts_per_layer": 8}},
    )
    with standing_in(load(str(recipe)).config) as imagined:
        found = prepare(imagined)
        layouts = expected_layouts(found.variants[0], found.moe)
    assert found.moe.checkpoint.parameters == 1_978_514_688
    planned = sum(each.parameters for each in layouts)
    # The paper leaves the first sparse layer whole, which no uniform format can hold.
    expert = found.moe.expert_bytes(1) // 4
    assert round((planned + 24 * expert) / 1e6) == 733
