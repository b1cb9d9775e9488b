"""The tensors that transformers will look for, from the model built without memory."""

from __future__ import annotations

import re
from typing import Any

from models.errors import CheckpointError
from models.moe import MoeCheckpoint


def check_dense_tensors(moe: MoeCheckpoint) -> None:
    """Compares every tensor outside the experts with the model transformers would build.

    transformers itself only warns about a missing tensor and starts it from random numbers.

    Raises:
        CheckpointError: config.json makes no model; a tensor is missing, unexpected or of another
            shape; a sparse layer has neither router nor experts.
    """
    model = _build(moe)
    _check_sparse_layers(moe, model)
    expected, optional = _expected_shapes(moe, model)
    found = {
        moe.family.memory_name(name): info
        for name, info in moe.checkpoint.tensors.items()
        if not moe.family.is_moe_tensor(name)
    }
    where = moe.checkpoint.folder
    for name, shape in expected.items():
        if name not in found and name not in optional:
            raise CheckpointError(f"tensor {name} is missing from {where}")
        if name in found and found[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(found[name].shape)}, config.json promises {list(shape)}"
            )
    extra = sorted(set(found) - set(expected) - optional)
    if extra:
        raise CheckpointError(
            f"{len(extra)} unexpected tensor(s) in {where}, first {extra[0]}",
            "config.json does not belong to these weights, or the family is not supported",
        )


def _build(moe: MoeCheckpoint) -> Any:
    """The transformers model on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(**moe.checkpoint.config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a value of the wrong kind leads to inside transformers
        raise CheckpointError(
            f"{moe.checkpoint.folder / 'config.json'} makes no {moe.family.model_type} model:"
            f" {' '.join(str(error).split())}",
            "download config.json again",
        ) from error


def _check_sparse_layers(moe: MoeCheckpoint, model: Any) -> None:
    routers = {moe.family.memory_name(moe.family.router_name(layer)) for layer in moe.layers}
    tail = f".{moe.family.memory_block}.{moe.family.router}"
    sparse = (name.removesuffix(tail) for name in model.state_dict() if name.endswith(tail))
    lost = [name.removeprefix("model.layers.") for name in sparse if name + tail not in routers]
    if lost:
        raise CheckpointError(
            f"layers {', '.join(lost)} have neither router nor experts in {moe.checkpoint.folder};"
            " config.json makes them sparse",
            "download the checkpoint again, or correct config.json",
        )


def _expected_shapes(moe: MoeCheckpoint, model: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """In-memory name -> shape of everything outside router and experts; and names that are tied."""
    moe_tensor = re.compile(
        rf"^model\.layers\.\d+\.{moe.family.memory_block}\."
        rf"(?:experts\.|{re.escape(moe.family.router)}$)"
    )
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not moe_tensor.match(name)
    }
    tied = getattr(model, "_tied_weights_keys", None) or {}
    return shapes, set(tied) if model.config.tie_word_embeddings else set()
