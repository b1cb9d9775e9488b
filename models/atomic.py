"""Writes that either happened or did not: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from models.errors import DiskFull, UserError

_CHUNK = 8 << 20
_WHOLE = 256 << 20
_SAMPLE = 64 << 10


def attempt() -> str:
    """A word that no other running process has. Process ids alone repeat on other hosts, where a
    node that was cut off may still be writing what another one writes anew."""
    return f"{os.uname().nodename}-{os.getpid()}"


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, otherwise it is removed.

    The name carries host and process: two attempts at one unit never share a temporary file.

    Raises:
        DiskFull: the device ran out of space (whichever library noticed first).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{attempt()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if _is_disk_full(error):
            raise _disk_full(path) from error
        raise


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Raises DiskFull for writes below `path` that go through no temporary file of ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_disk_full(error):
            raise _disk_full(path) from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    with staged(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as sorted, indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def quick_digest(path: Path) -> str:
    """SHA-256 of size and content; above 256 MiB, of size, head and 64 evenly spaced samples.

    Identifies a checkpoint file in well under a second, whatever its size. It is no proof that
    the file is intact, which is what the verify stage is for.
    """
    size = path.stat().st_size
    if size <= _WHOLE:
        return file_digest(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for sample in range(64):
            file.seek(sample * (size - _SAMPLE) // 63)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def text_digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link, or a copy across devices."""
    with staged(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_disk_full(error: BaseException) -> bool:
    # safetensors and Arrow report ENOSPC inside their own exception types, as text.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _disk_full(path: Path) -> DiskFull:
    existing = next(place for place in (path, *path.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    return DiskFull(
        f"no space left on the device while writing {path} ({free:,} bytes free)",
        "free space or move `run_dir` to a larger disk, then run the same command again:"
        " finished units are kept",
    )
