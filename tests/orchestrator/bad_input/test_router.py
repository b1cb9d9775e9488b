"""Routers and experts whose values are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.refusals import assert_one_message
from tests.orchestrator.tiny_run import Command, Inputs, expert, router


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("engine", ["resident", "streaming"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_router_logits_that_are_not_finite_are_refused(
    coalesce: Command, inputs: Inputs, engine: str, value: float
) -> None:
    """Also finite weights: 3e38 times a hidden state of 32 is more than float32 holds."""
    inputs.change_weights(lambda tensors: tensors[router(1)][6].fill_(value))
    recipe = inputs.recipe(model__verify="headers", calibrate__engine=engine)

    outcome = coalesce("calibrate", recipe, "--quiet")

    assert_one_message(outcome, "layer 1: router logits of", "of 128 tokens", "domain 'prose'")
    assert_one_message(outcome, "batch of blocks 0 to 7", "calibrate.dtype", "model.verify=full")
    assert left(inputs.run_dir / "calibration") == ["tokens.arrow", "tokens.arrow.json"]


def test_expert_outputs_that_are_not_finite_are_refused(coalesce: Command, inputs: Inputs) -> None:
    def damage(tensors: Any) -> None:
        for index in range(8):
            tensors[expert(0, index, "w2")][0, 0] = float("nan")

    inputs.change_weights(damage)

    outcome = coalesce("calibrate", inputs.recipe(model__verify="headers"), "--quiet")

    assert_one_message(outcome, "layer 0: expert outputs of 128 of 128 tokens are not finite")
