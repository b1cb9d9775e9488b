"""Narrower, fitted and decomposed: every reduction works for momentum, in both block styles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.mapped.registration import register
from orchestrator.errors import ConfigError
from orchestrator.load import load
from orchestrator.preflight import prepare
from stages.export.densify import densify
from tests import tiny_momentum
from tests.orchestrator.tiny_run import EXPERTS, WORDS, Command, Inputs
from tests.tiny import logits_of, random_ids
from tests.tiny_momentum import STYLES

IDS = random_ids(2, 9, vocabulary=60)


def recipe(inputs: Inputs, style: str, **changes: Any) -> Path:
    """A run on a random momentum model of eight experts and 24 neurons in three layers."""
    model = tiny_momentum.model(
        vocab_size=len(WORDS) + 4, num_local_experts=EXPERTS, block_style=style
    )
    model.save_pretrained(inputs.model)
    return inputs.recipe(**changes)


def finished(coalesce: Command, inputs: Inputs, path: Path) -> dict[int, dict[str, Any]]:
    """Layer -> what its unit says, of a run that ends well."""
    outcome = coalesce("run", path, "--quiet")
    assert outcome.code == 0, outcome.err
    markers = sorted((inputs.run_dir / "layers").glob("layer-*.json"))
    return {n: json.loads(path.read_text())["result"] for n, path in enumerate(markers)}


def opened(folder: Path, *, code: bool = False) -> Any:
    register()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code).eval()


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_narrower_experts_are_fitted_and_open_as_the_family(
    style: str, coalesce: Command, inputs: Inputs
) -> None:
    group = {"method": "coalesce", "budget": {"keep_ratio": 0.5}, "multiple": 2}
    path = recipe(inputs, style, group=group, refit={"polish": {"steps": 2}})

    found = finished(coalesce, inputs, path)

    for each in found.values():
        assert each["held_out_after"] <= each["held_out_before"]
    model = opened(inputs.run_dir / "output")
    assert type(model).__name__ == "MomentumForCausalLM" and model.config.block_style == style
    assert model.config.intermediate_size == 12
    assert logits_of(model, IDS).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_decomposed_experts_open_mapped_and_written_out(
    style: str, coalesce: Command, inputs: Inputs
) -> None:
    """U V + S behind a map, layers weighed by their gain, the down projections solved again."""
    path = recipe(
        inputs,
        style,
        group={
            "method": "mc_smoe",
            "scope": "global",
            "weigh_layers": "gain",
            "budget": {"keep_ratio": 0.5},
        },
        compress={"rank": 4, "sparse": 0.1, "importance": "activations", "whiten": True},
        refit={"enabled": True, "polish": {"steps": 0}},
        export={"format": "mapped"},
    )

    found = finished(coalesce, inputs, path)

    assert all(
        each["second_factor"]["after"] <= each["second_factor"]["before"] for each in found.values()
    )
    config = json.loads((inputs.run_dir / "output" / "config.json").read_text())
    kept = [config["experts_per_layer"][str(layer)] for layer in range(3)]
    assert (
        sum(kept) == 12 and kept[0] > kept[2] and set(config["expert_factors"]) == {"0", "1", "2"}
    )
    mapped = opened(inputs.run_dir / "output")
    assert type(mapped).__name__ == "CoalesceMomentumForCausalLM"
    assert mapped.config.block_style == style
    densify(inputs.run_dir / "output", inputs.root / "whole")
    whole = opened(inputs.root / "whole")
    assert type(whole).__name__ == "MomentumForCausalLM"
    assert whole.config.num_local_experts == EXPERTS
    torch.testing.assert_close(logits_of(mapped, IDS), logits_of(whole, IDS), rtol=1e-4, atol=1e-4)


def test_a_block_with_norms_behind_its_step_is_refused_behind_reduced_layers(
    inputs: Inputs,
) -> None:
    """Before any work, with the reason; in Mixtral's block it is not."""
    refit = {"enabled": True, "target": "sequential"}
    for style in STYLES:
        config = load(str(recipe(inputs, style, refit=refit))).config
        if style == "pre_ln":
            prepare(config)
            continue
        with pytest.raises(ConfigError, match=r"refit.target=sequential.*two norms behind"):
            prepare(config)
