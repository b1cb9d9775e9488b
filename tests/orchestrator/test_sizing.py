"""How thorough the refit is, and on how much text, where the config leaves it to the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orchestrator import sizing
from orchestrator.commands.plan import standing_in
from orchestrator.load import load, validate
from orchestrator.pipeline import alone
from orchestrator.preflight import Prepared, described, prepare
from orchestrator.run import observe
from stages.refit.config import PolishConfig, RefitConfig
from tests.orchestrator.tiny_run import Command, Inputs

MUCH = "calibrate.data.tokens=200000"
NARROW = "group={method: coalesce, budget: {keep_ratio: 0.5}}"


def prepared(inputs: Inputs, *overrides: str) -> Prepared:
    recipe = inputs.recipe(calibrate__sample={})
    return prepare(load(str(recipe), (NARROW, *overrides)).config)


def chosen(run: Prepared) -> tuple[str, object]:
    return run.config.refit.preset, run.config.calibrate.sample.tokens


def test_a_small_model_and_much_text_are_refitted_thoroughly_on_all_of_it(inputs: Inputs) -> None:
    run = prepared(inputs, MUCH)
    assert chosen(run) == ("thorough", 200_000)
    assert (run.config.refit.target, run.config.refit.polish.last_layer) == ("sequential", "logits")
    assert "thorough" in run.sizing and "200,000" in run.sizing


@pytest.mark.parametrize("tokens", [512, sizing.TOKENS - 1])
def test_little_text_is_not(inputs: Inputs, tokens: int) -> None:
    run = prepared(inputs, f"calibrate.data.tokens={tokens}")
    assert chosen(run) == ("parallel", 4096)
    assert run.config.refit.target == "original" and "fewer than 65,536" in run.sizing


def test_a_large_model_is_not(inputs: Inputs, tmp_path: Path) -> None:
    from transformers import MixtralConfig

    MixtralConfig(architectures=["MixtralForCausalLM"], dtype="bfloat16").save_pretrained(tmp_path)
    words = (NARROW, f"model.path={tmp_path}", f"model.tokenizer={inputs.model}", MUCH)
    config = load(str(inputs.recipe(calibrate__sample={})), words).config
    with standing_in(config) as imagined:
        run = described(imagined)
    assert chosen(run) == ("parallel", 4096)
    assert "more than 1e+14" in run.sizing


def test_the_sample_of_a_layer_stays_within_its_bytes(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "HELD_BYTES", 4 * 32 * 100_000)
    assert chosen(prepared(inputs, MUCH)) == ("thorough", 100_000)
    asked = prepared(inputs, MUCH, "calibrate.sample.tokens=100001")
    assert chosen(asked) == ("parallel", 100_001)
    assert "12,800,128 bytes" in asked.sizing


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("refit.preset=parallel", ("parallel", 200_000)),
        ("refit.preset=thorough", ("thorough", 200_000)),
        ("calibrate.sample.tokens=100000", ("thorough", 100_000)),
        ("calibrate.sample.tokens=1000", ("parallel", 1000)),
        # Observed once, decided by many: what is sampled does not depend on the first of them.
        ("group={method: reap}", ("thorough", 200_000)),
    ],
)
def test_what_is_given_counts(inputs: Inputs, word: str, expected: tuple[str, int]) -> None:
    words = [MUCH, word] if word.startswith("group") else [MUCH, word, NARROW]
    assert chosen(prepared(inputs, *reversed(words))) == expected


def test_single_settings_go_before_the_chosen_preset(inputs: Inputs) -> None:
    refit = prepared(inputs, MUCH, "refit.polish.steps=7", "refit.target=original").config.refit
    assert (refit.preset, refit.polish.steps, refit.target) == ("thorough", 7, "original")
    assert (refit.held_out, refit.polish.last_layer) == (0.1, "outputs")


def test_more_steps_than_are_cheap_are_not_taken_unasked(inputs: Inputs) -> None:
    run = prepared(inputs, MUCH, "refit.polish.steps=100000000")
    assert run.config.refit.preset == "parallel" and run.config.refit.polish.steps == 100_000_000


@pytest.mark.parametrize("words", [(), ("refit.polish.steps=7",), ("refit.preset=thorough",)])
def test_a_config_that_was_written_down_is_chosen_for_alike(
    inputs: Inputs, words: tuple[str, ...]
) -> None:
    config = load(str(inputs.recipe(calibrate__sample={})), (NARROW, MUCH, *words)).config
    again = validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config
    settled = prepare(config).config
    assert prepare(again).config == settled
    assert prepare(validate(settled.model_dump(mode="json"))).config == settled


def test_statistics_of_another_run_have_the_tokens_that_it_sampled(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = observe(prepared(inputs, "calibrate.sample.tokens=300"))
    words = (f"calibrate.statistics={statistics}", f"run_dir={inputs.root / 'other'}", MUCH)
    assert prepared(inputs, *words).config.refit.preset == "parallel"
    monkeypatch.setattr(sizing, "TOKENS", 300)
    found = prepared(inputs, *words)
    assert found.config.refit.preset == "thorough" and "300 sampled tokens" in found.sizing


def test_the_plan_says_what_was_chosen_and_why(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe(calibrate__sample={})
    few = " ".join(coalesce("plan", recipe, NARROW).out.split())
    assert "refit: every layer for itself (refit.preset=auto): 512 tokens are sampled" in few
    much = " ".join(coalesce("plan", recipe, NARROW, MUCH).out.split())
    assert "refit: thorough, layer after layer on 200,000 sampled tokens" in much
    asked = " ".join(coalesce("plan", recipe, NARROW, "refit.preset=parallel").out.split())
    assert "refit: refit.preset=parallel" in asked
    assert "refit:" not in coalesce("plan", recipe).out  # merging is not refitted


def test_a_probe_refits_one_layer_alone_whatever_the_run_does() -> None:
    thorough = RefitConfig(preset="thorough", enabled=True)
    found = alone(thorough)
    assert (found.together, found.polish.steps, found.polish.last_layer) == (None, 150, "outputs")
    assert (found.enabled, found.held_out) == (True, thorough.held_out)
    few = alone(RefitConfig(preset="thorough", polish=PolishConfig(steps=7)))
    assert few.polish.steps == 7
    assert alone(RefitConfig(preset="parallel")) == RefitConfig(preset="parallel")
