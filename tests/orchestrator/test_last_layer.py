"""The last layer polished towards the original's distributions, in a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator import samples
from orchestrator.load import validate
from orchestrator.preflight import Prepared, prepare
from orchestrator.run import run
from orchestrator.run_folder import MAIN
from stages.corpus.stage import read_blocks
from stages.inputs.read import LayerInputs
from stages.refit.layer import held_out
from stages.unit import beside
from tests.orchestrator.test_chain import COALESCE, MAPPED, MC_SMOE, REAP, opened, prepared

REFIT = {
    "enabled": True,
    "target": "sequential",
    "polish": {"steps": 20, "rate": 0.01, "last_layer": "logits"},
}
CASES = {
    "narrower experts": ("mixtral", COALESCE, {}, None),
    "fewer experts, weighed by domain": ("qwen3_moe", REAP, {}, {"prose": 3.0}),
    "merged experts, with momentum": ("momentum_smoe", MC_SMOE, MAPPED, None),
}


@torch.inference_mode()
def divergence(original: Any, reduced: Any, tokens: list[int], positions: Tensor) -> Tensor:
    """KL of the next token's distribution at some positions of a text, from whole models."""
    ids = torch.tensor([tokens])
    wanted, found = (
        model(input_ids=ids, use_cache=False).logits[0, positions].double().log_softmax(-1)
        for model in (original, reduced)
    )
    return (wanted.exp() * (wanted - found)).sum(-1)


def with_whole_text(job: Prepared) -> Prepared:
    """All observed tokens are the sample: few would teach nothing that holds for others."""
    values = job.config.model_dump(mode="json")
    values["calibrate"]["data"]["tokens"] = values["calibrate"]["sample"]["tokens"] = 3000
    return prepare(validate(values))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_the_last_layer_reports_is_what_whole_models_say(tmp_path: Path, case: Any) -> None:
    family, group, export, task = case
    changes = {"group": group | {"task": task}, "export": export, "refit": REFIT}
    job = with_whole_text(prepared(tmp_path, family, 3, **changes))
    run(job)
    last = max(job.moe.layers)
    marker = beside(job.folder.layers(MAIN) / f"layer-{last:05d}.safetensors")
    facts = json.loads(marker.read_text())["result"]
    sampled = samples.layer_inputs(job.folder, job.config.calibrate, job.moe)[last]
    inputs = LayerInputs.read(sampled)
    judges = held_out(inputs, job.config.refit.held_out)
    models = (
        opened(job.moe.checkpoint.folder),
        opened(job.folder.output(MAIN), code=bool(export)),
    )
    off = []
    for number in inputs.block[judges].unique().tolist():
        here = inputs.position[judges & (inputs.block == number)].long()
        block = read_blocks(job.folder.calibration_tokens, number, number + 1)[0]
        off.append(divergence(*models, list(block.tokens), here))

    assert facts["held_out_kl_after"] < facts["held_out_kl_before"]
    assert facts["held_out_kl_after"] == pytest.approx(float(torch.cat(off).mean()), rel=1e-3)
