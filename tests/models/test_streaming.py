"""A model that is run layer by layer is the model, bit for bit, in the memory of one layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.streaming.model import StreamedModel
from tests.tiny import open_model, same_bits, save_tiny
from tests.tiny_families import FAMILIES, ragged, save_family


def opened(folder: Path, dtype: str = "auto") -> StreamedModel:
    return StreamedModel(Checkpoint.open(folder), dtype)


@torch.inference_mode()
def streamed_logits(model: StreamedModel, inputs: dict[str, Tensor]) -> Tensor:
    """[B, S, V], every layer read, run and forgotten."""
    calls = model.calls(**inputs)
    hidden = calls[0].hidden
    for index, call in enumerate(calls):
        with model.layer(index) as layer:
            hidden = call.run(layer, hidden)
    return model.logits(hidden, **inputs)


@torch.inference_mode()
def whole_logits(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = open_model(folder)(use_cache=False, **inputs).logits
    return logits


# Equality with the whole model --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_of_left_padded_rows_equal_the_whole_models_bit_for_bit(
    family: str, tmp_path: Path
) -> None:
    folder = save_family(tmp_path, family)
    expected = whole_logits(folder, ragged())
    real = ragged()["attention_mask"]

    found = streamed_logits(opened(folder), ragged())

    assert expected[real].isfinite().all() and expected[real].std() > 0
    assert same_bits(found[real], expected[real])


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3", "Ernie4_5_Moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_same_half_precision(family: str, dtype: str, tmp_path: Path) -> None:
    """The last two keep parts of their routers in fp32 whatever the type is."""
    folder, kind = save_family(tmp_path, family), getattr(torch, dtype)
    with torch.inference_mode():
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
        expected = whole(use_cache=False, **ragged()).logits

    found = streamed_logits(opened(folder, dtype), ragged())

    assert found.dtype == kind
    assert same_bits(found, expected)


@pytest.mark.parametrize("family", ["DeepseekV3", "Ernie4_5_Moe"])
def test_every_tensor_of_a_layer_has_the_type_and_bits_of_the_whole_models(
    family: str, tmp_path: Path
) -> None:
    folder = save_family(tmp_path, family)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = whole.model.layers[2].state_dict()
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16, torch.float32}

    with opened(folder, "bfloat16").layer(2) as layer:
        found = layer.state_dict()

    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_a_sharded_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "one", "Mixtral")
    expected = streamed_logits(opened(folder), ragged())
    open_model(folder).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(Checkpoint.open(tmp_path / "many").files) > 2

    assert same_bits(streamed_logits(opened(tmp_path / "many"), ragged()), expected)


@pytest.mark.parametrize("family", ["Mixtral", "GraniteMoe", "Qwen3Moe"])
def test_names_as_in_memory_are_read_as_well(family: str, tmp_path: Path) -> None:
    """`save_pretrained` can write experts fused, under the names that they have in memory."""
    folder = save_family(tmp_path / "original", family)
    model = open_model(folder)
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    assert set(Checkpoint.open(tmp_path / "memory").tensors) <= set(model.state_dict())

    found = streamed_logits(opened(tmp_path / "memory"), ragged())

    assert same_bits(found, streamed_logits(opened(folder), ragged()))


# Memory -------------------------------------------------------------------------------------------


def in_memory(model: nn.Module) -> int:
    """Elements of all distinct parameters that are not on the meta device."""
    return sum(p.numel() for p in model.parameters() if not p.is_meta)


@pytest.mark.parametrize("depth", [2, 6])
def test_rest_and_one_layer_are_in_memory_whatever_the_depth(depth: int, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mixtral", num_hidden_layers=depth)
    whole = open_model(folder)
    layer = sum(p.numel() for p in whole.model.layers[0].parameters())
    rest = in_memory(whole) - depth * layer

    model = opened(folder)

    seen = [in_memory(model.model)]
    for index in range(depth):
        with model.layer(index):
            seen.append(in_memory(model.model))
        seen.append(in_memory(model.model))
    assert seen == [rest] + depth * [rest + layer, rest]


def test_a_layer_is_freed_when_its_use_fails(tmp_path: Path) -> None:
    model = opened(save_tiny(tmp_path, "mixtral"))
    before = in_memory(model.model)

    with pytest.raises(ZeroDivisionError), model.layer(1):
        _ = 1 // 0

    assert in_memory(model.model) == before


def test_a_tied_head_is_in_memory_once(tmp_path: Path) -> None:
    model = opened(save_tiny(tmp_path, "olmoe")).model

    assert model.lm_head.weight is model.model.embed_tokens.weight


# Errors -------------------------------------------------------------------------------------------


def edited(folder: Path, **changes: Tensor | None) -> Path:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LAYER = "model.layers.1.block_sparse_moe"


def test_a_missing_tensor_outside_the_layers_is_refused_at_once(tmp_path: Path) -> None:
    folder = edited(save_tiny(tmp_path, "mixtral"), **{"model.norm.weight": None})

    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        opened(folder)


def test_a_missing_tensor_of_a_layer_is_refused_when_it_is_read(tmp_path: Path) -> None:
    model = opened(edited(save_tiny(tmp_path, "mixtral"), **{f"{LAYER}.gate.weight": None}))
    with model.layer(0):
        pass

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate\.weight"), model.layer(1):
        pass


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_a_missing_expert_is_refused(part: str, tmp_path: Path) -> None:
    model = opened(
        edited(save_tiny(tmp_path, "mixtral"), **{f"{LAYER}.experts.2.{part}.weight": None})
    )

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts"), model.layer(1):
        pass


@pytest.mark.parametrize("name", [f"{LAYER}.gate.weight", f"{LAYER}.experts.2.w2.weight"])
def test_another_shape_in_a_layer_is_refused(name: str, tmp_path: Path) -> None:
    model = opened(edited(save_tiny(tmp_path, "mixtral"), **{name: torch.ones(3, 5)}))

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp"), model.layer(1):
        pass


def test_another_shape_outside_the_layers_is_refused(tmp_path: Path) -> None:
    folder = edited(save_tiny(tmp_path, "mixtral"), **{"model.norm.weight": torch.ones(5)})

    with pytest.raises(CheckpointError, match=r"shape \[5\], config.json promises \[32\]"):
        opened(folder)


def test_an_unexpected_tensor_is_refused(tmp_path: Path) -> None:
    folder = edited(save_tiny(tmp_path, "mixtral"), **{"model.layers.1.extra": torch.ones(1)})

    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.1\.extra"):
        opened(folder)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mixtral")
    checkpoint = Checkpoint.open(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(CheckpointError, match="cannot read"):
        StreamedModel(checkpoint)


def test_code_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mixtral")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (folder / "evil.py").write_text("raise SystemExit('ran')")

    assert type(opened(folder).model).__name__ == "MixtralForCausalLM"
