"""The tensors that transformers will look for, from the model built without memory."""

from __future__ import annotations

import re
from typing import Any

from models.classes import prepare_classes
from models.errors import CheckpointError
from models.moe import MoeCheckpoint


def check_dense_tensors(moe: MoeCheckpoint) -> set[str]:
    """Compares every tensor outside the experts with the model transformers would build.

    transformers itself only warns about a missing tensor and starts it from random numbers.
    Tensors that the family's class declares it will not load (layers that predict further tokens)
    are accepted, and copied as they are.

    Returns:
        their names on disk.

    Raises:
        CheckpointError: config.json makes no model; a tensor is missing, unexpected or of another
            shape; a sparse layer has neither router nor experts.
    """
    model = _build(moe)
    _check_sparse_layers(moe, model)
    expected, optional = _expected_shapes(moe, model), _tied(model)
    ignored = _ignored(moe, model)
    found = {
        moe.family.memory_name(name): info
        for name, info in moe.checkpoint.tensors.items()
        if not moe.family.is_expert_tensor(name) and name not in ignored
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
    return ignored


def check_width(moe: MoeCheckpoint, width: int) -> None:
    """Refuses a number of neurons that the family's class cannot give to routed experts alone.

    Raises:
        CheckpointError: names a tensor outside the experts whose size hangs on the same key.
    """
    changed = _build_from(moe, moe.family.with_width(moe.checkpoint.config, width))
    before, after = (_expected_shapes(moe, model) for model in (_build(moe), changed))
    moved = [name for name, shape in before.items() if after.get(name) != shape]
    if moved:
        raise CheckpointError(
            f"experts of {moe.family.model_type} cannot be narrowed to {width} neurons alone:"
            f" {moved[0]} would change from {list(before[moved[0]])} to"
            f" {list(after.get(moved[0], ()))} with them",
            "set export.format=mapped, or choose a method that merges or drops experts",
        )


def unloaded_elements(moe: MoeCheckpoint) -> int:
    """Stored floating elements that transformers does not load as parameters of their own.

    They belong to copies of tied weights, or to layers that its class ignores.
    """
    model = _build(moe)
    ignored, tied = _ignored(moe, model), _tied(model)
    return sum(
        info.meta().numel()
        for name, info in moe.checkpoint.tensors.items()
        if (name in ignored or moe.family.memory_name(name) in tied)
        and info.meta().is_floating_point()
    )


def _build(moe: MoeCheckpoint) -> Any:
    return _build_from(moe, moe.checkpoint.config)


def _build_from(moe: MoeCheckpoint, config_json: dict[str, Any]) -> Any:
    """The transformers model of a config.json, on the meta device."""
    import torch
    import transformers

    prepare_classes(config_json)
    try:
        config = transformers.AutoConfig.for_model(**config_json)
        with torch.device("meta"):
            return getattr(transformers, moe.family.auto_class).from_config(config)
    except Exception as error:  # whatever a value of the wrong kind leads to inside transformers
        raise CheckpointError(
            f"{moe.checkpoint.folder / 'config.json'} makes no {moe.family.model_type} model:"
            f" {' '.join(str(error).split())}",
            "download config.json again",
        ) from error


def _check_sparse_layers(moe: MoeCheckpoint, model: Any) -> None:
    found = {moe.family.memory_router_layer(name) for name in model.state_dict()}
    lost = sorted(layer for layer in found if layer is not None and layer not in moe.layers)
    if lost:
        raise CheckpointError(
            f"layers {', '.join(map(str, lost))} have neither router nor experts in"
            f" {moe.checkpoint.folder}; config.json makes them sparse",
            "download the checkpoint again, or correct config.json",
        )


def _expected_shapes(moe: MoeCheckpoint, model: Any) -> dict[str, tuple[int, ...]]:
    """In-memory name -> shape of everything outside the experts."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not moe.family.is_memory_expert(name)
    }


def _tied(model: Any) -> set[str]:
    """In-memory names of parameters that share the memory of another one."""
    return set(model.all_tied_weights_keys)


def _ignored(moe: MoeCheckpoint, model: Any) -> set[str]:
    patterns = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    expected = set(model.state_dict())
    return {
        name
        for name in moe.checkpoint.tensors
        if any(pattern.search(name) for pattern in patterns)
        and moe.family.memory_name(name) not in expected
        and not moe.family.is_expert_tensor(name)
    }
