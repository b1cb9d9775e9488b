"""A checkpoint without weights: headers that config.json implies, and holes where values would be.

Everything that reads headers alone (plan, budgets, exact sizes of outputs) works on it as on the
real one, before anything is downloaded. The file is sparse: its length is real, its bytes are not
on any disk.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.checkpoint import FLOAT_NAMES, SINGLE
from models.errors import CheckpointError
from models.families import find_family

_DTYPES = {name: stored for stored, name in FLOAT_NAMES.items()}
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_stand_in(source: Path, target: Path, dtype: str | None = None) -> Path:
    """Writes `target` as the checkpoint that `source/config.json` describes, without its values.

    Args:
        source: a folder with config.json; tokenizer files are taken along where they are.
        target: a folder, made here.
        dtype: of the weights, as torch calls it; None: what config.json says, else float32.

    Raises:
        CheckpointError: config.json is missing, no JSON, of no known family, or makes no model.
    """
    import torch

    config = _config(source)
    named = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    if named not in _DTYPES:
        raise CheckpointError(
            f"config.json names the type {named!r}", f"use one of {', '.join(_DTYPES)}"
        )
    tensors = _tensors(config)
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for name in _COMPANIONS:
        if (source / name).exists():
            (target / name).write_bytes((source / name).read_bytes())
    _write_sparse(target / SINGLE, tensors, _DTYPES[named], getattr(torch, named).itemsize)
    return target


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be read: {error}", "download config.json again"
        ) from error


def _tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape, by transformers' own conversion on tensors without memory."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    family = find_family(config)
    try:
        made = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = getattr(transformers, family.auto_class).from_config(made)
    except Exception as error:  # whatever a value of the wrong kind leads to inside transformers
        raise CheckpointError(
            f"config.json makes no {family.model_type} model: {' '.join(str(error).split())}",
            "download config.json again",
        ) from error
    tied = set(model.all_tied_weights_keys)
    state = {name: each for name, each in model.state_dict().items() if name not in tied}
    stored = revert_weight_conversion(model, state)
    return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def _write_sparse(
    path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str, itemsize: int
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(tensors.items()):
        begin, count = end, 1
        for length in shape:
            count *= length
        end = begin + count * itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
