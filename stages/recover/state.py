"""Where training stands, in a form that knows no ranks: values and Adam's moments by name, in fp32.

A state counts once its digest lies beside it. The two newest are kept, so that one that is damaged
on disk costs the steps since the one before.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from models.atomic import file_digest, write_json
from models.tensors import read_metadata, write_tensors
from stages.unit import beside

Named = dict[str, Tensor]
_KEPT = 2


@dataclass(frozen=True)
class State:
    """After `step` updates."""

    step: int
    values: Named
    first: Named
    second: Named
    # What else a kind of training has to remember (`stages/recover/pruning.py`).
    more: Named = field(default_factory=dict)


def save(folder: Path, state: State, fingerprint: str) -> Path:
    """Writes a state, atomically, and lets go of all but the two newest.

    Raises:
        DiskFull: nothing that was there is touched.
    """
    path = folder / f"state-{state.step:08d}.safetensors"
    tensors = {
        f"{kind}/{name}": tensor
        for kind in ("values", "first", "second", "more")
        for name, tensor in getattr(state, kind).items()
    }
    write_tensors(path, tensors, {"step": state.step, "fingerprint": fingerprint})
    write_json(beside(path), file_digest(path))
    for old in _states(folder)[:-_KEPT]:
        beside(old).unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    return path


def newest(folder: Path, fingerprint: str) -> State | None:
    """The newest state of this training that is whole; None: it starts from the beginning."""
    for path in reversed(_states(folder)):
        with suppress(OSError, ValueError):
            if json.loads(beside(path).read_text()) != file_digest(path):
                continue
            metadata = read_metadata(path)
            if metadata["fingerprint"] == fingerprint:
                return _read(path, metadata)
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.safetensors"))


def _read(path: Path, metadata: dict[str, Any]) -> State:
    from safetensors.torch import load_file

    parts: dict[str, Named] = {"values": {}, "first": {}, "second": {}, "more": {}}
    for key, tensor in load_file(path).items():
        kind, _, name = key.partition("/")
        parts[kind][name] = tensor
    return State(int(metadata["step"]), **parts)
