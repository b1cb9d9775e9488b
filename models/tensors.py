"""Tensors as immutable safetensors files that are equal byte for byte when their content is."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@contextmanager
def filling(
    path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, Any]
) -> Iterator[Callable[[str, Tensor], None]]:
    """A file of fp32 tensors that come one at a time, in any order; otherwise as `write_tensors`.

    Yields what takes a name and its tensor; every name must have come at the end.
    """
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(metadata, sort_keys=True)}}
    places, end = {}, 0
    for name in sorted(shapes):
        places[name], end = end, end + 4 * math.prod(shapes[name])
        offsets = [places[name], end]
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": offsets}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    missing = set(shapes)

    def put(name: str, tensor: Tensor) -> None:
        assert tuple(tensor.shape) == tuple(shapes[name]), (name, tensor.shape)
        file.seek(8 + len(raw) + places[name])
        file.write(tensor.float().contiguous().numpy(force=True).data)
        missing.remove(name)

    with staged(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        yield put
        assert not missing, missing


def read_metadata(path: Path) -> dict[str, Any]:
    """What `write_tensors` was given; empty for a file of another origin."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return dict(json.loads((handle.metadata() or {}).get(_KEY, "{}")))
