"""The reload gate opens what is particular to families: buffers, two stacks, layers it ignores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from models.skeleton import check_dense_tensors
from stages.export.stage import run_one
from tests.planted_export import export_unit
from tests.planted_families import EXPERTS, planted_model

EXTRA = "model.layers.61."  # DeepSeek-V3's class ignores what lies there


def exported(folder: Path, form: Any) -> tuple[MoeCheckpoint, dict[str, Any]]:
    """What the gate found out about the checkpoint in a format."""
    unit = export_unit(folder, form)
    return unit.moe, run_one(unit)


def with_extra_layer(folder: Path, prefix: str = EXTRA) -> None:
    """Adds a layer as DeepSeek-V3 has one behind its last: it predicts one more token."""
    tensors = load_file(folder / "model.safetensors")
    start = "model.layers.2."
    extra = {n.replace(start, prefix): t.clone() for n, t in tensors.items() if start in n}
    extra[f"{prefix}eh_proj.weight"] = torch.randn(32, 64)
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("gpt_oss", "mapped"),
        ("switch_transformers", "native"),
    ],
)
def test_the_gate_opens_it_and_counts_its_parameters(
    family: str, form: str, tmp_path: Path
) -> None:
    planted_model(family).save_pretrained(tmp_path / "original")

    _, result = exported(tmp_path, form)

    assert result["bytes"] == result["predicted_bytes"]
    assert result["checks"]["class"].removeprefix("Coalesce")
    if form == "mapped":
        assert result["checks"]["expanded_max_difference"] < 1e-5


@pytest.mark.slow
def test_layers_that_predict_further_tokens_are_copied_and_no_longer_announced(
    tmp_path: Path,
) -> None:
    planted_model("deepseek_v3", num_nextn_predict_layers=1).save_pretrained(tmp_path / "original")
    with_extra_layer(tmp_path / "original")

    moe, _ = exported(tmp_path, "native")

    assert moe.layers == (1, 2)
    output = MoeCheckpoint.open(tmp_path / "output")
    copied = [name for name in moe.checkpoint.tensors if name.startswith(EXTRA)]
    before, after = moe.checkpoint.read(copied), output.checkpoint.read(copied)
    assert len(copied) > 3 * EXPERTS
    assert all(before[name].equal(after[name]) for name in copied)
    assert moe.checkpoint.config["num_nextn_predict_layers"] == 1
    assert output.checkpoint.config["num_nextn_predict_layers"] == 0
    assert output.num_experts == EXPERTS // 2


def test_the_names_that_are_copied_are_known_beforehand(tmp_path: Path) -> None:
    planted_model("deepseek_v3").save_pretrained(tmp_path)
    before = set(load_file(tmp_path / "model.safetensors"))
    with_extra_layer(tmp_path)
    moe = MoeCheckpoint.open(tmp_path)

    assert check_dense_tensors(moe) == set(moe.checkpoint.tensors) - before
    assert set(moe.dense_names(61)) == set(moe.checkpoint.tensors) - before


@pytest.mark.parametrize("prefix", ["model.layers.3.", "mtp.layers.0."])
def test_a_layer_that_the_class_does_not_ignore_is_refused(prefix: str, tmp_path: Path) -> None:
    planted_model("deepseek_v3").save_pretrained(tmp_path)
    with_extra_layer(tmp_path, prefix)

    with pytest.raises(CheckpointError, match="unexpected tensor"):
        check_dense_tensors(MoeCheckpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("family", "bias"),
    [
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("minimax_m2", "model.layers.1.block_sparse_moe.e_score_correction_bias"),
        ("ernie4_5_moe", "model.layers.1.mlp.moe_statics.e_score_correction_bias"),
        ("lfm2_moe", "model.layers.1.feed_forward.expert_bias"),
        ("gpt_oss", "model.layers.1.mlp.router.bias"),
    ],
)
def test_a_missing_bias_of_a_router_is_refused(family: str, bias: str, tmp_path: Path) -> None:
    """transformers would start it from zero, and choose other experts without a word."""
    planted_model(family).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[bias]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match="bias is missing"):
        check_dense_tensors(MoeCheckpoint.open(tmp_path))
