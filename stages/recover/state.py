"""Where training stands, in a form that knows no ranks: values and Adam's moments by name, in fp32.

A state counts once its digest lies beside it. The two newest are kept, so that one that is damaged
on disk costs the steps since the one before. It is written and read one tensor at a time: nobody
ever holds a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from models.atomic import file_digest, write_json
from models.tensors import filling, read_metadata
from stages.unit import beside

Named = dict[str, Tensor]
# What is kept of every trained value: itself, and Adam's first and second moments.
Kind = Literal["values", "first", "second"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_MORE = "more"
_KEPT = 2


@dataclass(frozen=True)
class State:
    """After `step` updates; read from its file when it is asked."""

    step: int
    path: Path

    @classmethod
    def at(cls, folder: Path, step: int) -> State:
        """The state of that step."""
        return cls(step, folder / f"state-{step:08d}.safetensors")

    def read(self, kind: Kind, name: str) -> Tensor:
        """One tensor, fp32, on the CPU."""
        return self._tensor(f"{kind}/{name}")

    @property
    def more(self) -> Named:
        """What else a kind of training remembers (`stages/recover/pruning.py`)."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as handle:
            # A safetensors handle cannot be iterated itself.
            keys = [key for key in handle.keys() if key.startswith(f"{_MORE}/")]  # noqa: SIM118
        return {key.removeprefix(f"{_MORE}/"): self._tensor(key) for key in keys}

    def _tensor(self, key: str) -> Tensor:
        from safetensors import safe_open

        # Closed at once, so that the pages can be given back.
        with safe_open(self.path, framework="pt") as handle:
            found: Tensor = handle.get_tensor(key)
        return found


def save(
    state: State,
    shapes: Mapping[str, Iterable[int]],
    parts: Iterable[tuple[Kind, str, Tensor]],
    more: Named,
    fingerprint: str,
) -> None:
    """Writes a state, atomically, and lets go of all but the two newest.

    Args:
        shapes: of the values, by name.
        parts: kind, name and tensor of all three kinds, in any order.
        more: see `State.more`; fp32.

    Raises:
        DiskFull: nothing that was there is touched.
    """
    every = {f"{kind}/{name}": list(shape) for name, shape in shapes.items() for kind in KINDS}
    every |= {f"{_MORE}/{name}": list(tensor.shape) for name, tensor in more.items()}
    with filling(state.path, every, {"step": state.step, "fingerprint": fingerprint}) as put:
        for kind, name, tensor in parts:
            put(f"{kind}/{name}", tensor)
        for name, tensor in more.items():
            put(f"{_MORE}/{name}", tensor)
    write_json(beside(state.path), file_digest(state.path))
    for old in _states(state.path.parent)[:-_KEPT]:
        beside(old).unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def newest(folder: Path, fingerprint: str) -> State | None:
    """The newest state of this training that is whole; None: it starts from the beginning."""
    for path in reversed(_states(folder)):
        with suppress(OSError, ValueError):
            if json.loads(beside(path).read_text()) != file_digest(path):
                continue
            metadata = read_metadata(path)
            if metadata["fingerprint"] == fingerprint:
                return State(int(metadata["step"]), path)
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.safetensors"))
