"""A catalogue: a folder with everything of a remote checkpoint but its weights, which come later.

It lies where all nodes see it. `.remote.json` lists the files with their versions, `.headers/` has
the beginning of every weight file, and what is small lies there as it is.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from models.atomic import link_or_copy, quick_digest, write_bytes, write_json
from models.errors import StorageError
from models.remote.fetch import fetch
from models.remote.store import Stored, head, join, listed
from models.remote.urls import url_key

# Weights, and what describes or executes the original: neither is metadata.
NOT_METADATA = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".py", ".md")
WEIGHTS = ".safetensors"
_CATALOGUE = ".remote.json"
_HEADERS = ".headers"
_PREFIX = 8
_GUESS = 256 << 10
_SIDE_BY_SIDE = 8


@dataclass(frozen=True)
class Origin:
    """Where the files of a catalogue come from, and where their weights go on a node."""

    folder: Path  # the catalogue
    url: str
    files: dict[str, Stored]
    # A folder of each node, with $NAMES of its environment; None: the catalogue itself.
    cache: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Origin | None:
        """None for an ordinary folder."""
        try:
            found = json.loads((folder / _CATALOGUE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        files = {name: Stored(**each) for name, each in found["files"].items()}
        return cls(folder, found["url"], files, found["cache"])

    @property
    def weights(self) -> list[str]:
        """Names of the weight files."""
        return sorted(name for name in self.files if name.endswith(WEIGHTS))

    @property
    def place(self) -> Path:
        """The folder of this node that weights are fetched to.

        Raises:
            StorageError: it names a variable that is not set here.
        """
        if self.cache is None:
            return self.folder
        expanded = os.path.expanduser(os.path.expandvars(self.cache))
        if "$" in expanded:
            raise StorageError(
                f"cache.dir is {self.cache}, and a variable in it is not set on this node"
                f" ({os.uname().nodename})",
                "set it on every node, or name a folder",
            )
        return Path(expanded).absolute() / self.folder.name

    def header(self, file: str) -> Path:
        """The beginning of a weight file: length and JSON header."""
        return self.folder / _HEADERS / file

    def fetched(self, file: str) -> Path:
        """The file on this node, fetched unless it is there.

        Raises:
            StorageError: it cannot be had, or is another one than was listed.
        """
        if file not in self.files:
            raise StorageError(f"{file} is not at {self.url}", "was the index copied alone?")
        return fetch(join(self.url, file), self.files[file], self.place / file)

    def complete(self, files: Sequence[str]) -> Path:
        """A folder of this node with these weight files and all metadata, as libraries want it."""
        for file in files:
            self.fetched(file)
        if self.place != self.folder:
            for name in self.metadata:
                if not (self.place / name).exists():
                    link_or_copy(self.folder / name, self.place / name)
        return self.place

    @property
    def metadata(self) -> list[str]:
        """Names of config, tokenizer, index and the like."""
        return sorted(name for name in self.files if is_metadata(name))

    def missing_bytes(self, files: Sequence[str]) -> int:
        """Bytes of these files that this node does not have yet.

        Raises:
            StorageError: as `place`.
        """
        lacking = (self.files[file] for file in files if not (self.place / file).exists())
        return sum(max(each.bytes, 0) for each in lacking)

    def identity(self, file: str) -> str:
        """A word that changes with the content of a file; of a local one, what it always has."""
        if self.url.startswith("file://"):
            with suppress(OSError):
                return quick_digest(Path(join(self.url, file).removeprefix("file://")))
        return f"{self.files[file].bytes} {self.files[file].version}"

    def fill(self) -> None:
        """Fetches metadata and headers, several at a time, and writes the catalogue last."""
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            list(pool.map(self._fetch_metadata, self.metadata))
            list(pool.map(self._fetch_header, self.weights))
        wanted = {
            "url": self.url,
            "cache": self.cache,
            "files": {name: asdict(each) for name, each in sorted(self.files.items())},
        }
        if not (self.folder / _CATALOGUE).exists() or Origin.read(self.folder) != self:
            write_json(self.folder / _CATALOGUE, wanted)

    def _fetch_metadata(self, name: str) -> None:
        fetch(join(self.url, name), self.files[name], self.folder / name)

    def _fetch_header(self, file: str) -> None:
        if self.header(file).exists():
            return
        url = join(self.url, file)
        found = head(url, _GUESS)
        length = struct.unpack("<Q", found[:_PREFIX])[0] if len(found) >= _PREFIX else 0
        # A length beyond the file is no header: what was read shows it to whoever parses it.
        if len(found) - _PREFIX < length <= self.files[file].bytes:
            found = head(url, _PREFIX + length)
        write_bytes(self.header(file), found[: _PREFIX + length])


def is_metadata(name: str) -> bool:
    """A file beside the weights that a compressed checkpoint needs as well."""
    return "/" not in name and not name.startswith(".") and not name.endswith(NOT_METADATA)


def catalogue(url: str, parent: Path, cache: str | None) -> Path:
    """The catalogue of the checkpoint at a URL, below `parent`; a changed one gets another folder.

    Raises:
        StorageError: no bucket, no permission, or no checkpoint there.
    """
    files = listed(url)
    if not any(name.endswith(WEIGHTS) for name in files) or "config.json" not in files:
        some = ", ".join(sorted(files)[:4]) or "nothing"
        raise StorageError(
            f"{url} is no checkpoint: config.json and *.safetensors are needed, there is {some}",
            "correct `model.path`; pickle files are never opened",
        )
    known = {n: each for n, each in files.items() if is_metadata(n) or n.endswith(WEIGHTS)}
    versions = {name: [each.bytes, each.version] for name, each in known.items()}
    folder = parent / url_key(json.dumps([url, versions], sort_keys=True))
    Origin(folder, url, known, cache).fill()
    return folder


def held_here(folder: Path) -> list[str]:
    """The homes (`Checkpoint.home`) whose files this node has in its cache already."""
    origin = Origin.read(folder)
    if origin is None or origin.cache is None:
        return []
    return [f"{folder.name}/{file}" for file in origin.weights if (origin.place / file).exists()]
