"""Text behind a URL: fetched once into a folder that all nodes see."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from models.atomic import write_json
from models.errors import StorageError
from models.remote.fetch import fetch
from models.remote.store import Stored, join, listed
from models.remote.urls import pattern_root, url_key

_LIST = ".remote.json"


def fetch_texts(url: str, parent: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files at a URL, of a pattern or in a folder, that have one of these suffixes.

    They lie below `parent`, in a folder of this URL, and are fetched again when they have changed.

    Raises:
        StorageError: there is none, or no permission to read.
    """
    found = {name or url.rpartition("/")[2]: each for name, each in listed(url).items()}
    files = {name: each for name, each in found.items() if name.endswith(suffixes)}
    if not files:
        raise StorageError(
            f"there is no text at {url}: {len(found)} files, none of {', '.join(suffixes)}",
            "correct the path of this text source",
        )
    folder, base = parent / url_key(url), pattern_root(url)
    known = _listing(folder)
    for name, stored in files.items():
        if known.get(name) != _word(stored):
            (folder / name).unlink(missing_ok=True)
        where = url if base is None and url.rpartition("/")[2] == name else join(base or url, name)
        fetch(where, stored, folder / name)
    write_json(folder / _LIST, {name: _word(stored) for name, stored in sorted(files.items())})
    return fetched_texts(url, parent)


def fetched_texts(url: str, parent: Path) -> list[Path]:
    """What `fetch_texts` has fetched, in the order of the names; nothing is asked of the store."""
    folder = parent / url_key(url)
    return [folder / name for name in sorted(_listing(folder))]


def _listing(folder: Path) -> dict[str, str]:
    with suppress(FileNotFoundError):
        return dict(json.loads((folder / _LIST).read_text()))
    return {}


def _word(stored: Stored) -> str:
    return f"{stored.bytes} {stored.version}"
