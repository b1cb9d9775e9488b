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
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    expected, optional = _expected_shapes(moe)
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


def _expected_shapes(moe: MoeCheckpoint) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """In-memory name -> shape of everything outside router and experts; and names that are tied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.for_model(**moe.checkpoint.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
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
    return shapes, set(tied) if config.tie_word_embeddings else set()
