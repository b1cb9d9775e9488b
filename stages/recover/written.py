"""Trained values on their way back into the files of the checkpoint that was trained.

Names, shapes, types, order and metadata stay those of the student's files, and so do the bytes of
every tensor that was not trained.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.atomic import link_or_copy, staged
from models.checkpoint import Checkpoint
from models.errors import CheckpointError


def on_disk(model: Any, values: Mapping[str, Tensor], student: Checkpoint) -> dict[str, Tensor]:
    """Name on disk -> value, in the type and shape that the student's files have.

    Args:
        model: the student; transformers knows from it how names in memory came about.
        values: by name in memory.

    Raises:
        CheckpointError: a value belongs to no tensor of the student, or has another shape.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found = revert_weight_conversion(model, _with_copies(model, values, student))
    converted = {}
    for name, tensor in found.items():
        info = student.tensors.get(name)
        if info is None or info.shape != tuple(tensor.shape):
            there = "no tensor" if info is None else f"shape {list(info.shape)}"
            raise CheckpointError(
                f"trained {name} has shape {list(tensor.shape)}, {student.folder} has {there}"
            )
        converted[name] = tensor.to(info.meta().dtype).contiguous()
    return converted


@contextmanager
def overwriting(
    student: Checkpoint, targets: Mapping[str, Path]
) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """New weight files of the student: copies into which trained tensors go, a few at a time.

    Yields what takes trained tensors by name on disk, as `on_disk` gives them; it raises
    CheckpointError for one that is NaN or infinite. Files appear at the end; those without trained
    tensors are linked.
    """
    with ExitStack() as stack:
        copies: dict[str, _Copy] = {}

        def put(trained: Mapping[str, Tensor]) -> None:
            _refuse_non_finite(trained)
            for name, tensor in trained.items():
                file = student.tensors[name].file
                if file not in copies:
                    copy = _copied(student.path(file), targets[file])
                    copies[file] = stack.enter_context(copy)
                copies[file].put(name, tensor)

        yield put
    for file in targets.keys() - copies.keys():
        link_or_copy(student.path(file), targets[file])


def write_files(
    student: Checkpoint,
    trained: Mapping[str, Tensor],
    targets: Mapping[str, Path],
    gone: frozenset[str] = frozenset(),
) -> None:
    """Writes every weight file of the student anew, with the trained tensors in their places.

    Args:
        trained: by name on disk.
        targets: file of the student -> path of the new one; one without trained tensors is linked.
        gone: tensors of the student that the new files do not have.

    Raises:
        CheckpointError: a trained value is NaN or infinite in the type on disk.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    _refuse_non_finite(trained)
    for file, target in targets.items():
        names = [info.name for info in student.tensors.values() if info.file == file]
        if not (trained.keys() | gone) & set(names):
            link_or_copy(student.path(file), target)
            continue
        with safe_open(student.path(file), framework="pt") as handle:
            tensors = {
                n: trained[n] if n in trained else handle.get_tensor(n)
                for n in names
                if n not in gone
            }
            metadata = handle.metadata()
        with staged(target) as temporary:
            save_file(tensors, temporary, metadata)


class _Copy:
    """A safetensors file some of whose tensors are written over where they lie."""

    def __init__(self, file: BinaryIO) -> None:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._file, self._begin = file, 8 + length
        self._places = {n: each["data_offsets"] for n, each in header.items()}

    def put(self, name: str, tensor: Tensor) -> None:
        """Of the type and size that is there."""
        begin, end = self._places[name]
        assert tensor.nbytes == end - begin, (name, tensor.nbytes, end - begin)
        self._file.seek(self._begin + begin)
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(force=True).data)


@contextmanager
def _copied(source: Path, target: Path) -> Iterator[_Copy]:
    with staged(target) as temporary:
        shutil.copyfile(source, temporary)
        with temporary.open("r+b") as file:
            yield _Copy(file)


def _refuse_non_finite(trained: Mapping[str, Tensor]) -> None:
    for name, tensor in trained.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} is not finite after training")


def _with_copies(
    model: Any, values: Mapping[str, Tensor], student: Checkpoint
) -> dict[str, Tensor]:
    """Tied values under all names under which the files hold them."""
    found = dict(values)
    for name, source in model.all_tied_weights_keys.items():
        if source in found and name in student.tensors:
            found[name] = found[source]
        elif name in found and source not in found and source in student.tensors:
            found[source] = found[name]
    return found
