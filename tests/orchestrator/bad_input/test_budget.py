"""Budgets that cannot be met, and formats that cannot hold a decision."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import preflight
from orchestrator.load import load
from orchestrator.preflight import prepare
from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import (
    HIDDEN,
    INTERMEDIATE,
    Command,
    Inputs,
)

BUDGETS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "fewer than top-k": (
        ("group.budget.keep_ratio=0.125",),
        ["1 experts per layer are fewer than the 2", "keep at least 2 of 8"],
    ),
    "more than there are": (
        ("group.budget={experts_per_layer: 9}",),
        ["asks for 18 experts, the model has 16", "must not exceed 8"],
    ),
    "bytes for not one expert": (
        ("group.budget={target_bytes: 1000}",),
        ["target_bytes is 1,000; the smallest", "2 of 8 experts", "takes 69,848 bytes"],
    ),
    "bytes for not one neuron": (
        ("group={method: coalesce, budget: {target_bytes: 1000}}",),
        ["the budget leaves 0 of 16 neurons per expert", "all else takes 50,952 bytes"],
    ),
    "global scope, native format": (("group.scope=global",), ["group.scope=uniform", "mapped"]),
    "pruning, mapped format": (
        ("group={method: frequency}", "export.format=mapped"),
        ["mapped format redirects every expert", "export.format=native"],
    ),
    "pruning, expanded format": (
        ("group={method: reap}", "export.format=expanded"),
        ["expanded format redirects every expert", "export.format=native"],
    ),
    "a layer that is not there": (
        ("group.skip_layers=[1, 7]", "export.format=mapped"),
        ["skip_layers names [7]", "0 to 1"],
    ),
    "skipped layers, native format": (("group.skip_layers=[0]",), ["4 to 8", "format=mapped"]),
    "more per layer than the budget": (
        ("group.scope=global", "group.min_per_layer=5", "export.format=mapped"),
        ["a budget of 8 experts cannot keep 5 in each of 2 layers", "min_per_layer"],
    ),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_that_cannot_be_met_is_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    overrides, fragments = BUDGETS[name]
    assert_refused(coalesce, inputs, inputs.recipe(), *fragments, overrides=overrides)


def expected_bytes(recipe: Path, *overrides: str) -> int:
    """Weight bytes of the output; test_plan shows that they are what is written."""
    prepared = prepare(load(str(recipe), overrides).config)
    layouts = preflight.expected_layouts(prepared.variants[0], prepared.moe)
    return sum(layout.file_bytes for layout in layouts)


@pytest.mark.parametrize("slack", [0, 1, -1])
@pytest.mark.parametrize("kept", [3, 6])
def test_a_size_in_bytes_is_used_to_the_last_expert_that_fits(
    inputs: Inputs, kept: int, slack: int
) -> None:
    recipe = inputs.recipe()
    size = expected_bytes(recipe, f"group.budget={{experts_per_layer: {kept}}}")
    smaller = expected_bytes(recipe, f"group.budget={{experts_per_layer: {kept - 1}}}")
    achieved = expected_bytes(recipe, f"group.budget={{target_bytes: {size + slack}}}")
    assert achieved == (smaller if slack < 0 else size)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("skipped", ["[]", "[0]"])
def test_a_size_in_bytes_is_never_exceeded_by_a_mapped_model(
    inputs: Inputs, scope: str, skipped: str
) -> None:
    recipe = inputs.recipe()
    options = (f"group.scope={scope}", f"group.skip_layers={skipped}", "export.format=mapped")
    one_expert = 3 * HIDDEN * INTERMEDIATE * 4
    step = one_expert if scope == "global" else one_expert * (1 if skipped == "[0]" else 2)
    for target in range(104_000, 145_000, 2_500):
        achieved = expected_bytes(recipe, *options, f"group.budget={{target_bytes: {target}}}")
        assert achieved <= target < achieved + step + 100
