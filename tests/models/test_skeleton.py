"""Tensors outside the experts are compared with the model that transformers would build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from models.skeleton import check_dense_tensors
from tests.tiny import FAMILIES, HIDDEN, save_tiny

NORM = "model.layers.0.input_layernorm.weight"


def edited(folder: Path, **changes: torch.Tensor | None) -> MoeCheckpoint:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    return MoeCheckpoint.open(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_save_pretrained_wrote_is_accepted(family: str, tmp_path: Path) -> None:
    check_dense_tensors(MoeCheckpoint.open(save_tiny(tmp_path, family)))


def test_a_tied_head_may_be_absent_or_stored(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mixtral", tie_word_embeddings=True)
    moe = MoeCheckpoint.open(folder)
    assert "lm_head.weight" not in moe.checkpoint.tensors

    check_dense_tensors(moe)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    check_dense_tensors(edited(folder, **{"lm_head.weight": embedding.clone()}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tensor_is_refused(family: str, tmp_path: Path) -> None:
    moe = edited(save_tiny(tmp_path, family), **{NORM: None})

    with pytest.raises(CheckpointError, match=f"tensor {NORM} is missing"):
        check_dense_tensors(moe)


def test_a_missing_untied_head_is_refused(tmp_path: Path) -> None:
    moe = edited(save_tiny(tmp_path, "mixtral"), **{"lm_head.weight": None})

    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        check_dense_tensors(moe)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    moe = edited(save_tiny(tmp_path, "mixtral"), **{NORM: torch.ones(HIDDEN + 1)})

    with pytest.raises(CheckpointError, match=r"has shape \[33\], config.json promises \[32\]"):
        check_dense_tensors(moe)


def test_an_unexpected_tensor_is_refused(tmp_path: Path) -> None:
    moe = edited(save_tiny(tmp_path, "mixtral"), **{"model.layers.0.extra": torch.ones(1)})

    with pytest.raises(CheckpointError, match=r"unexpected tensor.*model\.layers\.0\.extra"):
        check_dense_tensors(moe)


def test_a_missing_shared_expert_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"
    moe = edited(save_tiny(tmp_path, "qwen2_moe"), **{name: None})

    with pytest.raises(CheckpointError, match=r"shared_expert\.up_proj\.weight is missing"):
        check_dense_tensors(moe)


def test_a_sparse_layer_without_router_and_experts_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mixtral")
    tensors = load_file(folder / "model.safetensors")
    lost = {n: None for n in tensors if n.startswith("model.layers.1.block_sparse_moe.")}

    with pytest.raises(CheckpointError, match="layers 1 have neither router nor experts"):
        check_dense_tensors(edited(folder, **lost))


def test_a_config_that_makes_no_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "nothing"}))

    with pytest.raises(CheckpointError, match="makes no mixtral model"):
        check_dense_tensors(MoeCheckpoint.open(folder))
