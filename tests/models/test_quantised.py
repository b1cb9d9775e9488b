"""Quantised checkpoints read as the floating ones that transformers decodes them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from models.quantised import Dequantised, decode_fp8, dequantised
from models.skeleton import check_dense_tensors
from stages.export.config import ExportConfig
from stages.group.decision import from_labels
from stages.model import load_model
from stages.verify.stage import plan, run_one
from tests.planted_families import EXPERTS, open_family, outputs, tiny_model
from tests.tiny import compress, same_bits

BLOCK = 12  # divides neither 32 nor 16: the last blocks of rows and columns are narrower
MXFP4 = {"quant_method": "mxfp4"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def rewritten(folder: Path, tensors: dict[str, Tensor], scheme: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = scheme
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4")
    model = tiny_model("gpt_oss", hidden_size=64, intermediate_size=32)
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith("_proj") and ".experts." in n]:
        count, columns, rows = tensors.pop(name).shape
        shape = (count, rows, columns // 32)

        def random(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

        tensors[f"{name}_blocks"] = random(0, 256, *shape, 16)
        tensors[f"{name}_scales"] = random(120, 126, *shape)
    return rewritten(folder, tensors, MXFP4)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    tiny_model("deepseek_v3").to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".experts." in n or "o_proj" in n]:
        tensors[name], tensors[f"{name}_scale_inv"] = in_blocks(tensors[name].float())
    return rewritten(folder, tensors, FP8)


def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 [O, I] and one scale per block of 12 x 12."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scales, values = torch.empty(rows, columns), torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = weight[block].abs().max() / 448
            values[block] = weight[block] / scales[i, j]
    return values.to(torch.float8_e4m3fn), scales


def test_mxfp4_is_decoded_as_transformers_decodes_it(mxfp4: Path) -> None:
    moe, stored = MoeCheckpoint.open(mxfp4), load_file(mxfp4 / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])

        assert same_bits(moe.checkpoint.read([name])[name], expected)
        assert same_bits(moe.checkpoint.read_pieces([(name, 5)])[name, 5], expected[5])
        assert moe.checkpoint.tensors[name].shape == expected.shape
        assert moe.checkpoint.tensors[name].nbytes == expected.nbytes


def test_fp8_is_decoded_block_by_block(fp8: Path) -> None:
    moe, stored = MoeCheckpoint.open(fp8), load_file(fp8 / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    values, scales = stored[name].float(), stored[f"{name}_scale_inv"]

    found = moe.checkpoint.read([name])[name]

    assert found.dtype == torch.bfloat16 and found.shape == values.shape
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            exact = float(values[i, j]) * float(scales[i // BLOCK, j // BLOCK])
            assert float(found[i, j]) == float(torch.tensor(exact).to(torch.bfloat16))


def test_fp8_agrees_with_transformers_where_blocks_divide_the_matrix() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(24, 36, generator=torch.Generator().manual_seed(1))
    values, scales = in_blocks(weight)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)

    found = decode_fp8(values, scales, (BLOCK, BLOCK), torch.bfloat16)

    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (found.float() - weight).abs().max() < 0.2


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_a_quantised_checkpoint_is_merged_and_written_in_floating_point(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    moe = MoeCheckpoint.open(request.getfixturevalue(kind))
    assert moe.quantised and check_dense_tensors(moe) == set()
    labels = [expert // 2 * 2 for expert in range(EXPERTS)]
    decisions = [from_labels(layer, labels, [1.0] * EXPERTS) for layer in moe.layers]

    folder = compress(moe, decisions, tmp_path, ExportConfig(format="expanded"))

    model, info = open_family(folder)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert outputs(model).isfinite().all()
    written = Checkpoint.open(folder)
    assert "quantization_config" not in written.config
    assert {info.dtype for info in written.tensors.values()} <= {"BF16", "F32"}


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_a_quantised_model_is_opened_decoded(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    moe = MoeCheckpoint.open(folder)

    state = load_model(folder, "auto").state_dict()

    layer = moe.layers[0]
    name = moe.family.memory_prefix(layer) + "experts.down_proj"
    expert = moe.read_expert(layer, 3).down
    assert state[name].dtype == torch.bfloat16
    assert same_bits(state[name][3], expert.T if kind == "mxfp4" else expert)


def test_verification_reads_decoded_values(fp8: Path) -> None:
    checkpoint = dequantised(Checkpoint.open(fp8))
    assert isinstance(checkpoint, Dequantised)

    (unit,) = plan(checkpoint, fp8 / "marks")

    assert run_one(unit)["tensors"] == len(checkpoint.tensors)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"quant_method": "awq"}, "quantised with awq, which is not decoded"),
        ({"quant_method": "gptq"}, "quantised with gptq"),
        ({"quant_method": "bitsandbytes"}, "quantised with bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({}, "quantised with None"),
        ({"quant_method": "fp8"}, "weight_block_size=None"),
        ({**FP8, "fmt": "float8_e5m2"}, "quantised with fp8"),
        ({**FP8, "weight_block_size": [8, 8]}, r"has shape \[3, 3\], .* needs \[4, 4\]"),
    ],
)
def test_other_schemes_are_refused(
    fp8: Path, tmp_path: Path, scheme: dict[str, Any], message: str
) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    (tmp_path / "config.json").write_text((fp8 / "config.json").read_text())

    with pytest.raises(CheckpointError, match=message):
        MoeCheckpoint.open(rewritten(tmp_path, tensors, scheme))


def test_missing_scales_are_refused(fp8: Path, tmp_path: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"]
    (tmp_path / "config.json").write_text((fp8 / "config.json").read_text())

    with pytest.raises(CheckpointError, match=r"1 scale.* missing, first .*up_proj"):
        MoeCheckpoint.open(rewritten(tmp_path, tensors, FP8))


def test_scales_without_a_scheme_are_refused(fp8: Path, tmp_path: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    (tmp_path / "config.json").write_text((fp8 / "config.json").read_text())
    rewritten(tmp_path, tensors, {})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match=r"unexpected, first .*scale_inv"):
        MoeCheckpoint.open(tmp_path)
