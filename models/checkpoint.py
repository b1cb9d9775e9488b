"""A Hugging Face checkpoint folder, read lazily: headers first, tensors one by one."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.atomic import quick_digest
from models.errors import CheckpointError
from models.remote.origin import Origin

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100 << 20

# A tensor, and one entry of its first axis (None: all of it).
Piece = tuple[str, int | None]

# Types whose values can be averaged as they are; quantised ones would have to be decoded first.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FLOAT_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk. `dtype` is the safetensors name (BF16, F32, I64, ...)."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def meta(self) -> torch.Tensor:
        """The tensor without memory; bytes where its type cannot be averaged."""
        import torch

        if self.dtype not in FLOAT_BYTES:
            return torch.empty((self.nbytes,), dtype=torch.uint8, device="meta")
        return torch.empty(self.shape, dtype=getattr(torch, FLOAT_NAMES[self.dtype]), device="meta")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors. Opening it reads headers only.

    Where the weights lie behind a URL, the folder is a catalogue (`models/remote/origin.py`), and a
    file is fetched when something in it is first read.
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    files: tuple[str, ...]
    origin: Origin | None = field(default=None, kw_only=True)

    @classmethod
    def open(cls, folder: Path, *, allow_links: bool = False) -> Checkpoint:
        """Reads config, index and every header.

        Args:
            folder: a local checkpoint folder.
            allow_links: follow symbolic links that lead out of the folder. The blob links of a
                Hugging Face cache are always followed.

        Raises:
            CheckpointError: with cause, numbers and remedy, before any tensor is read.
        """
        if not folder.is_dir():
            raise CheckpointError(
                f"no checkpoint folder at {folder}",
                "give a local folder or a hub name that can be downloaded",
            )
        config, origin = _read_json(folder / "config.json"), Origin.read(folder)
        wanted = _weight_map(folder, origin)
        tensors: dict[str, TensorInfo] = {}
        for file in sorted(set(wanted.values())) if wanted else [SINGLE]:
            path, size = _header_of(folder, file, origin, allow_links=allow_links)
            for info in _read_header(path, file, size):
                if wanted.get(info.name, file) == file:
                    tensors[info.name] = info
        _check_index(wanted, tensors)
        files = tuple(sorted({info.file for info in tensors.values()}))
        return cls(folder, dict(sorted(tensors.items())), config, files, origin=origin)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files as they lie on disk."""
        if self.origin is not None:
            return sum(self.origin.files[file].bytes for file in self.files)
        return sum((self.folder / file).stat().st_size for file in self.files)

    def path(self, file: str) -> Path:
        """A weight file on this node, fetched if it has to be."""
        return self.folder / file if self.origin is None else self.origin.fetched(file)

    def complete(self) -> Path:
        """A folder of this node with all files, for libraries that open folders."""
        return self.folder if self.origin is None else self.origin.complete(self.files)

    def identity(self, file: str) -> str:
        """A word that changes with the content of a weight file; nothing is fetched for it."""
        if self.origin is not None:
            return self.origin.identity(file)
        return quick_digest(self.folder / file)

    def home(self, names: Iterable[str]) -> str | None:
        """What units that read these tensors on one node have in common: the file with most of
        their bytes. None where every node reads the same files anyway."""
        if self.origin is None or self.origin.cache is None:
            return None
        sizes: dict[str, int] = {}
        for info in (self.tensors[name] for name in names):
            sizes[info.file] = sizes.get(info.file, 0) + info.nbytes
        file = max(sorted(sizes), key=sizes.__getitem__, default=None)
        return None if file is None else f"{self.folder.name}/{file}"

    @property
    def parameters(self) -> int:
        """Number of stored elements of floating type."""
        sizes = ((info.nbytes, FLOAT_BYTES.get(info.dtype)) for info in self.tensors.values())
        return sum(nbytes // width for nbytes, width in sizes if width)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Loads the named tensors as stored, opening each file once."""
        return {name: t for (name, _), t in self.read_pieces((n, None) for n in names).items()}

    def read_pieces(self, pieces: Iterable[Piece]) -> dict[Piece, torch.Tensor]:
        """Loads tensors, or single entries of their first axis, opening each file once.

        Nothing but the entry is read: one expert of a fused tensor costs one expert.
        """
        by_file: dict[str, list[Piece]] = {}
        for piece in dict.fromkeys(pieces):
            by_file.setdefault(self._info(piece[0]).file, []).append(piece)
        return {
            piece: tensor
            for file, wanted in sorted(by_file.items())
            for piece, tensor in self._read_file(file, wanted)
        }

    def stream(self, infos: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """Tensors of one file, one after another, opening it once."""
        found = self._read_file(infos[0].file, [(info.name, None) for info in infos])
        return ((info, tensor) for info, (_, tensor) in zip(infos, found, strict=True))

    def _read_file(
        self, file: str, pieces: Sequence[Piece]
    ) -> Iterator[tuple[Piece, torch.Tensor]]:
        from safetensors import SafetensorError, safe_open

        path = self.path(file)
        try:
            with safe_open(path, framework="pt") as handle:
                for name, index in pieces:
                    if index is None:
                        yield (name, index), handle.get_tensor(name)
                    else:
                        yield (name, index), handle.get_slice(name)[index : index + 1][0]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"tensor {name} is missing from {self.folder}")
        return self.tensors[name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", "is this a checkpoint folder?") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _weight_map(folder: Path, origin: Origin | None) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint; empty for a single-file one."""
    if (folder / INDEX).exists():
        mapping = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        return {str(name): str(file) for name, file in mapping.items()}
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return {}
    if origin is not None and SINGLE in origin.files:
        return {}
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    remedy = "convert it to safetensors first: pickle files are never opened" if pickles else ""
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}", remedy)


def _contained(folder: Path, file: str, *, allow_links: bool) -> Path:
    """The path of `file`, refused when its name or a link leads out of the folder."""
    path = folder / file
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise CheckpointError(
            f"{folder / INDEX} names {file!r}, a file outside the checkpoint folder",
            "do not use this checkpoint: a well-formed index names files in its own folder",
        )
    target, root = path.resolve(), folder.resolve()
    # A snapshot of the Hugging Face cache links to ../../blobs of the same repository.
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not allow_links and not any(target.is_relative_to(each) for each in roots):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the checkpoint folder",
            "set `model.allow_links=true` if you trust it",
        )
    return path


def _header_of(
    folder: Path, file: str, origin: Origin | None, *, allow_links: bool
) -> tuple[Path, int]:
    """A file that begins with the header of a weight file, and the size of the weight file."""
    path = _contained(folder, file, allow_links=allow_links)
    if origin is not None:
        if file not in origin.files:
            raise CheckpointError(f"{file} is missing at {origin.url}", "copy the checkpoint again")
        return origin.header(file), origin.files[file].bytes
    if not path.exists():
        raise CheckpointError(f"{path} is missing", "download the checkpoint again")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", "download the checkpoint again")
    return path, path.stat().st_size


def _read_header(path: Path, file: str, size: int) -> list[TensorInfo]:
    """Parses a safetensors header and compares the promised bytes with the file's size."""
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        raw = handle.read(length) if 0 < length <= min(size, _MAX_HEADER) else b""
    try:
        header = dict(json.loads(raw))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} ({size:,} bytes) has no safetensors header", "download the file again"
        ) from error
    header.pop("__metadata__", None)
    infos = [_tensor_info(path, file, name, entry) for name, entry in header.items()]
    promised = 8 + length + sum(info.nbytes for info in infos)
    if promised != size:
        raise CheckpointError(
            f"{path} is {'truncated' if size < promised else 'too long'}:"
            f" its header promises {promised:,} bytes, the file has {size:,}",
            "download the file again",
        )
    return infos


def _tensor_info(path: Path, file: str, name: str, entry: Any) -> TensorInfo:
    try:
        begin, end = entry["data_offsets"]
        info = TensorInfo(name, file, str(entry["dtype"]), tuple(entry["shape"]), end - begin)
        promised = math.prod(info.shape) * FLOAT_BYTES.get(info.dtype, 0)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header entry of {name} is malformed", "download the file again"
        ) from error
    if info.dtype in FLOAT_BYTES and info.nbytes != promised:
        raise CheckpointError(
            f"{path}: the header gives {name} {info.nbytes:,} bytes, {info.dtype} of shape"
            f" {list(info.shape)} takes {promised:,}",
            "download the file again",
        )
    return info


def _check_index(wanted: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """The index and the headers must agree on which tensor lies where."""
    for name, file in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"the index promises {name} in {file}, which does not hold it")
    unlisted = sorted(set(tensors) - set(wanted)) if wanted else []
    if unlisted:
        raise CheckpointError(f"{len(unlisted)} tensors are not in the index, e.g. {unlisted[0]}")
