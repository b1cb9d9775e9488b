"""Families that differ from Mixtral go through the same command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.moe import MoeCheckpoint
from orchestrator.engine import choose
from orchestrator.load import load
from orchestrator.preflight import Prepared, expected_decisions, prepare
from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import Command, Inputs
from tests.planted_families import EXPERTS, planted_model


def with_family(inputs: Inputs, family: str, **overrides: object) -> Inputs:
    """The inputs with another model under the same tokenizer."""
    planted_model(family, **overrides).save_pretrained(inputs.model)
    return inputs


def prepared(inputs: Inputs, *overrides: str) -> Prepared:
    return prepare(load(str(inputs.recipe()), overrides).config)


def test_an_encoder_decoder_is_never_streamed(coalesce: Command, inputs: Inputs) -> None:
    with_family(inputs, "switch_transformers")

    found = choose(prepared(inputs, "calibrate.memory_bytes=1"))

    assert found.engine == "resident"
    assert found.why == "an encoder-decoder is held whole by every worker"
    ranks = ("executor.kind=ray", "executor.ranks_per_replica=2")
    for overrides in (("calibrate.engine=streaming",), ranks):
        assert_refused(
            coalesce,
            inputs,
            inputs.recipe(),
            "is observed by one process that holds all of it",
            "set calibrate.engine=resident",
            overrides=overrides,
        )


def test_an_encoder_decoder_has_no_mapped_form(coalesce: Command, inputs: Inputs) -> None:
    with_family(inputs, "nllb-moe")

    assert_refused(
        coalesce,
        inputs,
        inputs.recipe(export__format="mapped"),
        "nllb-moe does not have mapped",
        "`coalesce ls families`",
    )


def test_a_budget_that_router_groups_cannot_share_names_the_next(
    coalesce: Command, inputs: Inputs
) -> None:
    with_family(inputs, "deepseek_v3")

    assert_refused(
        coalesce,
        inputs,
        inputs.recipe(group__budget={"experts_per_layer": 5}),
        "5 of 8 experts cannot be shared out to the 2 groups",
        "keep 6, or use export.format=mapped",
    )


def test_a_budget_in_bytes_and_baselines_keep_to_the_router_groups(inputs: Inputs) -> None:
    with_family(inputs, "deepseek_v3")
    native = prepared(inputs, "group.budget.keep_ratio=0.75")
    largest = native.moe.checkpoint.file_bytes
    budget = f"group.budget={{target_bytes: {largest * 9 // 10}}}"

    found = [native, prepared(inputs, budget), prepared(inputs, "export.format=mapped", budget)]

    for run in found[:2]:
        for variant in run.variants:
            (kept,) = {len(d.representatives) for d in expected_decisions(variant, run.moe)}
            assert kept in (4, 6)


@pytest.mark.slow
def test_a_quantised_model_with_a_further_layer_is_compressed_and_the_report_says_so(
    coalesce: Command, inputs: Inputs
) -> None:
    """Block-wise fp8, router groups, correction biases, and a layer for multi-token prediction."""
    with_family(inputs, "deepseek_v3", num_nextn_predict_layers=1)
    quantise(inputs)

    outcome = coalesce("run", inputs.recipe(group__budget={"experts_per_layer": 4}))

    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    assert any("tensors are copied as they are" in each for each in report["warnings"])
    assert any("the output is not quantised" in each for each in report["warnings"])
    assert report["bytes"]["after"] == report["bytes"]["predicted"]
    output = MoeCheckpoint.open(inputs.run_dir / "output")
    assert (output.num_experts, output.router_groups) == (4, 2)
    half = EXPERTS // 2
    for groups in report["groups"].values():
        assert sorted(group[0] >= half for group in groups) == [False, False, True, True]
        assert all(len({expert >= half for expert in group}) == 1 for group in groups)


def quantise(inputs: Inputs) -> None:
    """Experts in fp8 with one scale per 16 x 16 block, and a layer behind the last."""
    tensors = load_file(inputs.weights)
    further = {
        name.replace("layers.2.", "layers.61."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.2." in name
    }
    for name in [n for n in tensors if ".experts." in n]:
        rows, columns = (size // 16 for size in tensors[name].shape)
        blocks = tensors[name].float().reshape(rows, 16, columns, 16)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        values = (blocks / scales[:, None, :, None]).reshape(tensors[name].shape)
        tensors[name] = values.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales.contiguous()
    save_file(tensors | further, inputs.weights, metadata={"format": "pt"})
    scheme = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    inputs.change_config(quantization_config=scheme, dtype="bfloat16")
    assert Path(inputs.weights).exists()
