"""Tensors and config.json that contradict each other, and values that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.orchestrator.refusals import assert_one_message, assert_refused
from tests.orchestrator.tiny_run import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    Command,
    Inputs,
    expert,
    router,
    snapshot,
)

HEAD = "lm_head.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], list[str]]] = {
    "missing expert": (
        lambda t: t.pop(expert(1, 3, "w2")),
        ["1 expert tensor(s) missing", expert(1, 3, "w2"), "promises 8 experts per layer"],
    ),
    "extra expert": (
        lambda t: t.update({expert(0, 8): torch.zeros(INTERMEDIATE, HIDDEN)}),
        ["1 expert tensor(s) unexpected", expert(0, 8), "promises 8 experts per layer"],
    ),
    "missing router": (lambda t: t.pop(router(1)), ["1 expert tensor(s) missing", router(1)]),
    "missing sparse block": (
        lambda t: [t.pop(name) for name in list(t) if "layers.1.block_sparse_moe" in name],
        ["layers 1 have neither router nor experts"],
    ),
    "no router": (lambda t: [t.pop(router(layer)) for layer in (0, 1)], ["has no MoE layer"]),
    "expert of wrong shape": (
        lambda t: t.update({expert(0, 1): torch.zeros(INTERMEDIATE, HIDDEN + 1)}),
        [expert(0, 1), "[16, 33]", "[16, 32]"],
    ),
    "router of wrong shape": (
        lambda t: t.update({router(0): torch.zeros(EXPERTS - 1, HIDDEN)}),
        [router(0), "[7, 32]", "[8, 32]"],
    ),
    "expert of wrong dtype": (
        lambda t: t.update({expert(0, 1): torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.int8)}),
        [expert(0, 1), "dtype I8", "dequantise"],
    ),
    "missing dense tensor": (lambda t: t.pop(HEAD), [f"tensor {HEAD} is missing"]),
    "extra dense tensor": (
        lambda t: t.update({"model.surprise.weight": torch.zeros(1)}),
        ["1 unexpected tensor(s)", "model.surprise.weight"],
    ),
    "dense tensor of wrong shape": (
        lambda t: t.update({HEAD: torch.zeros(63, HIDDEN)}),
        [HEAD, "[63, 32]", "[64, 32]"],
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_config_json_does_not_promise_are_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    change, fragments = TENSORS[name]
    recipe = inputs.recipe()
    inputs.change_weights(change)
    assert_refused(coalesce, inputs, recipe, *fragments)


CONFIG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a misspelt family": ({"model_type": "mixtrall"}, ["'mixtrall'", "did you mean mixtral?"]),
    "a dense family": (
        {"model_type": "llama"},
        ["no adapter", "'llama'", "known: afmoe, deepseek_v2"],
    ),
    "no family": ({"model_type": None}, ["no adapter for model_type"]),
    "no hidden size": ({"hidden_size": None}, ["hidden_size"]),
    "words for a number": ({"hidden_size": "wide"}, ["hidden_size"]),
    "no intermediate size": ({"intermediate_size": None}, ["intermediate_size"]),
    "no top-k": ({"num_experts_per_tok": None}, ["num_experts_per_tok"]),
    "no number of experts": ({"num_local_experts": None}, ["num_local_experts"]),
    "no vocabulary": ({"vocab_size": None}, ["vocab_size"]),
    "heads as words": ({"num_attention_heads": "four"}, ["num_attention_heads"]),
    "more selected than there are": (
        {"num_experts_per_tok": 9},
        ["selects 9 of 8 experts", "num_experts_per_tok"],
    ),
    "an impossible number of heads": ({"num_attention_heads": 0}, ["config.json"]),
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_config_json_that_makes_no_model_is_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    values, fragments = CONFIG[name]
    recipe = inputs.recipe()
    inputs.change_config(**values)
    assert_refused(coalesce, inputs, recipe, *fragments)


def poison(inputs: Inputs) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[expert(1, 5)][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])

    inputs.change_weights(change)


def test_values_that_are_not_finite_end_the_run_in_verify(
    coalesce: Command, inputs: Inputs
) -> None:
    poison(inputs)
    outcome = coalesce("run", inputs.recipe(), "--quiet")
    assert_one_message(outcome, expert(1, 5), "3 values that are NaN or infinite, of 512")
    written = {path for path in snapshot(inputs.run_dir) if not path.startswith("verify")}
    logs = {"logs", "logs/verify", "logs/verify/model.safetensors.log"}
    assert written == {"run.json", "config.yaml", "events.jsonl", "run.lock"} | logs


def test_deep_validation_finds_values_that_are_not_finite_and_writes_nothing(
    coalesce: Command, inputs: Inputs
) -> None:
    poison(inputs)
    recipe = inputs.recipe()
    before = snapshot(inputs.root)
    assert_one_message(coalesce("validate", recipe, "--deep"), expert(1, 5), "3 values")
    assert snapshot(inputs.root) == before
