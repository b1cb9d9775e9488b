"""Experts whose rows are no whole 16 bytes: the mapped format opens and computes with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from orchestrator.load import load
from orchestrator.preflight import prepare
from orchestrator.run import run
from tests.orchestrator.tiny_run import Inputs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["original", "sequential"])
def test_layers_of_five_neurons_are_refitted_opened_and_run(
    inputs: Inputs, kind: str, target: str
) -> None:
    model = MixtralForCausalLM.from_pretrained(inputs.model, dtype=getattr(torch, kind))
    model.save_pretrained(inputs.model)
    changes: dict[str, Any] = {
        "group": {"method": "coalesce", "multiple": 1, "budget": {"keep_ratio": 0.3125}},
        "refit": {"target": target, "polish": {"steps": 2}},
        "export": {"format": "mapped"},
    }
    run(prepare(load(str(inputs.recipe(**changes))).config))
    found = AutoModelForCausalLM.from_pretrained(
        inputs.run_dir / "output", trust_remote_code=True, dtype="auto"
    )
    assert found.model.layers[0].mlp.experts.down_proj.shape[-1] == 5
    assert found(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all()
