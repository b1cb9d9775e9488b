"""One file from a store to a path of this node: whole and compared, or not there at all."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.atomic import staged
from models.errors import StorageError
from models.remote.store import Stored, file_md5, get, look

# Whether an ETag that looks like an MD5 is one. Those of encrypted buckets are not, and say so
# by differing from the same bytes twice.
_other_words: set[str] = set()


def fetch(url: str, expected: Stored, target: Path) -> Path:
    """Makes sure that `target` holds the file; processes of a node wait for the one that fetches.

    Raises:
        StorageError: the file is not there, has changed since it was listed, or arrives damaged.
    """
    if _is_whole(target, expected):
        return target
    with _alone(target) as alone:
        if _is_whole(target, expected):
            return target
        if alone:
            for leftover in target.parent.glob(f".{target.name}.*.tmp"):
                leftover.unlink(missing_ok=True)
        with staged(target) as temporary:
            _fetch(url, expected, temporary)
    return target


def _is_whole(target: Path, expected: Stored) -> bool:
    """Files get their name when they are whole; another size is another version of the file."""
    with suppress(FileNotFoundError):
        return expected.bytes in (-1, target.stat().st_size)
    return False


def _fetch(url: str, expected: Stored, temporary: Path) -> None:
    get(url, temporary)
    _check_size(url, expected, temporary)
    if expected.md5 is None or url.partition("://")[0] in _other_words:
        return
    first = file_md5(temporary)
    if first == expected.md5:
        return
    get(url, temporary)
    _check_size(url, expected, temporary)
    second = file_md5(temporary)
    if second == expected.md5:
        return
    if first != second:
        raise StorageError(
            f"{url} arrives with other bytes each time (MD5 {first}, then {second})",
            "check the network and the store, then run the same command again",
        )
    _other_words.add(url.partition("://")[0])


def _check_size(url: str, expected: Stored, temporary: Path) -> None:
    size, now = temporary.stat().st_size, look(url)
    if now != expected:
        raise StorageError(
            f"{url} has changed since the run began: it had {expected.bytes:,} bytes and version"
            f" {expected.version!r}, now {now.bytes:,} and {now.version!r}",
            "restore it, or use another run_dir for the new file",
        )
    if expected.bytes not in (-1, size):
        raise StorageError(
            f"{size:,} of {expected.bytes:,} bytes of {url} arrived", "run the same command again"
        )


@contextmanager
def _alone(target: Path) -> Iterator[bool]:
    """Waits for other processes of this node; False where the file system has no locks.

    Two may then fetch the same file: both have names of their own until they are whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
