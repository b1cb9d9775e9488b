"""MomentumSMoE checkpoints go through the same command, down to folders that open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.checkpoint import Checkpoint
from models.mapped import registration
from tests import tiny_momentum
from tests.orchestrator.tiny_run import EXPERTS, WORDS, Command, Inputs
from tests.tiny import random_ids

ROBUST = {"block_style": "post_ln", "momentum_kind": "robust", "num_local_experts": EXPERTS}


def run(coalesce: Command, inputs: Inputs, **changes: Any) -> dict[str, Any]:
    """The report of a run on a robust momentum model."""
    model = tiny_momentum.model(vocab_size=len(WORDS) + 4, **ROBUST)
    model.save_pretrained(inputs.model)
    data = {"sources": [{"path": str(inputs.text), "domain": "prose"}], "tokens": 256}
    evaluate = {"data": data | {"sequence_length": 16}, "kl_positions": 8, "baselines": []}
    outcome = coalesce("run", inputs.recipe(evaluate=evaluate, **changes))
    assert (outcome.code, outcome.err) == (0, "")
    found: dict[str, Any] = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    return found


def opened(folder: Path, *, code: bool) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code).eval()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["resident", "streaming"])
def test_native_output_is_a_momentum_model_with_fewer_experts(
    coalesce: Command, inputs: Inputs, engine: str
) -> None:
    report = run(coalesce, inputs, calibrate__engine=engine)

    folder = inputs.run_dir / "output"
    model = opened(folder, code=False)
    assert type(model).__name__ == "MomentumForCausalLM"
    assert model.config.num_local_experts == EXPERTS // 2
    assert model.config.momentum_kind == "robust"
    assert (folder / "modeling_momentum.py").exists()
    assert report["bytes"]["after"] == report["bytes"]["predicted"]
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    assert report["perplexity"]["compressed"]["overall"] > 1


@pytest.mark.slow
def test_mapped_output_equals_the_expanded_one(coalesce: Command, inputs: Inputs) -> None:
    report = run(coalesce, inputs, export__format="mapped")
    assert report["gate"]["checks"]["expanded_max_difference"] < 1e-5

    model = opened(inputs.run_dir / "output", code=True)

    assert type(model).__name__ == "CoalesceMomentumForCausalLM"
    registration.register()
    here = opened(inputs.run_dir / "output", code=False)
    ids = random_ids(2, 9)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, here(input_ids=ids).logits)


@pytest.mark.slow
def test_keeping_every_expert_changes_nothing(coalesce: Command, inputs: Inputs) -> None:
    """M15: as many groups as experts."""
    run(coalesce, inputs, group__budget={"keep_ratio": 1.0})

    before, after = Checkpoint.open(inputs.model), Checkpoint.open(inputs.run_dir / "output")
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        assert before.read([name])[name].equal(after.read([name])[name])
