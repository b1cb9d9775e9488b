"""Tensors as immutable safetensors files that are equal byte for byte when their content is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.atomic import staged

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "coalesce"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes one file, atomically.

    Metadata is one JSON string: safetensors writes several in an order that changes by process.
    """
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with staged(path) as temporary:
        save_file(contiguous, temporary, {_KEY: json.dumps(metadata or {}, sort_keys=True)})


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write_tensors` was given; empty for a file of another origin."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return dict(json.loads((handle.metadata() or {}).get(_KEY, "{}")))
