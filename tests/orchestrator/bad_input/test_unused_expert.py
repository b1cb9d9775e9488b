"""A layer in which an expert received no token has a defined result."""

from __future__ import annotations

import json

import pytest
import torch

from tests.orchestrator.tiny_run import (
    Command,
    Inputs,
    router,
)


def close_expert(tensors: dict[str, torch.Tensor]) -> None:
    """Hidden states of one sign and a router row of the other: expert 6 is never chosen."""
    tensors["model.embed_tokens.weight"].abs_()
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1)
    for name in list(tensors):
        if "layers.0.self_attn.o_proj" in name:
            tensors[name].zero_()
    tensors[router(0)][6] = -10


@pytest.mark.slow
def test_an_expert_that_no_token_chose_is_merged_and_named(
    coalesce: Command, inputs: Inputs
) -> None:
    inputs.change_weights(close_expert)
    outcome = coalesce("run", inputs.recipe())
    assert outcome.code == 0, outcome.err
    message = "layer 0: experts [6] received none of 512 calibration tokens"
    assert message in outcome.out
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    assert [text for text in report["warnings"] if text.startswith(message)]
    assert any(6 in group and group[0] != 6 for group in report["groups"]["0"])
    events = (inputs.run_dir / "events.jsonl").read_text().splitlines()
    warnings = [e for line in events if (e := json.loads(line))["event"] == "warning"]
    assert any(event["message"].startswith(message) for event in warnings)
