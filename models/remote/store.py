"""One store: list, read, fetch and send whole files, with errors that say what to do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from models.errors import StorageError, StoreSilent, UserError
from models.remote.urls import is_url, pattern_root

_MD5 = re.compile(r"[0-9a-f]{32}")
# Where an object store or a server names the content of a file, best first.
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "checksum", "LastModified", "Last-Modified",
             "last_modified", "updated", "mtime")  # fmt: skip
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss")
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Stored:
    """One file of a store: its bytes, and a word that changes with its content."""

    bytes: int
    version: str

    @property
    def md5(self) -> str | None:
        """The version, where it has the form of an MD5. Encrypted buckets give other words."""
        return self.version if _MD5.fullmatch(self.version) else None


def look(url: str) -> Stored:
    """Size and version of a file.

    Raises:
        StorageError: it is not there, or may not be read.
    """
    with speaking_plainly(url):
        fs, path = _open(url)
        fs.invalidate_cache()
        return _stored(fs.info(path))


def listed(url: str) -> dict[str, Stored]:
    """Files at a URL, by their path relative to it: of a folder, a pattern, or one file.

    An object store has no folders: what holds nothing is not there.

    Raises:
        StorageError: no bucket, no permission, no such protocol.
    """
    with speaking_plainly(url):
        fs, path = _open(url)
        fs.invalidate_cache()
        root = pattern_root(url)
        if root is not None:
            found = fs.glob(path, detail=True)
            base = fs._strip_protocol(root)
        else:
            found, base = fs.find(path, detail=True), path
        files = {name: info for name, info in found.items() if info.get("type") != "directory"}
        if not files:
            _check_bucket(fs, url)
        # A web server's listing is names alone.
        whole = {n: i if i.get("size") is not None else fs.info(n) for n, i in files.items()}
        return {_relative(name, base): _stored(info) for name, info in sorted(whole.items())}


def head(url: str, count: int) -> bytes:
    """The first bytes of a file."""
    with speaking_plainly(url):
        fs, path = _open(url)
        # A server without ranges sends all of it.
        return bytes(fs.cat_file(path, start=0, end=count)[:count])


def get(url: str, target: Path) -> None:
    """Copies a file of the store to a path."""
    with speaking_plainly(url):
        fs, path = _open(url)
        fs.get_file(path, str(target))


def put(source: Path, url: str) -> Stored:
    """Sends a file and looks at what arrived."""
    with speaking_plainly(url):
        fs, path = _open(url)
        if fs.protocol in ("file", ("file", "local")):
            fs.makedirs(fs._parent(path), exist_ok=True)
        fs.put_file(str(source), path)
    return look(url)


def put_bytes(data: bytes, url: str) -> None:
    """Writes a small file."""
    with speaking_plainly(url):
        fs, path = _open(url)
        if fs.protocol in ("file", ("file", "local")):
            fs.makedirs(fs._parent(path), exist_ok=True)
        fs.pipe_file(path, data)


def file_md5(path: Path) -> str:
    """MD5 of a file's content, in hexadecimal: what many stores call the ETag."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def join(url: str, name: str) -> str:
    """A file below a URL; the URL itself for the name of a single file."""
    return f"{url.rstrip('/')}/{name}" if name else url


@contextmanager
def speaking_plainly(url: str) -> Iterator[None]:
    """Turns what client libraries raise into errors with a remedy.

    Raises:
        StorageError: the store refuses or lacks something.
        StoreSilent: it does not answer; another time it may.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        protocol = url.partition("://")[0]
        extra = "pip install 'coalesce-moe[s3]'" if protocol in ("s3", "s3a") else str(error)
        raise StorageError(f"{protocol}:// URLs need a package that is missing", extra) from error
    except Exception as error:  # botocore, aiohttp and fsspec have dozens of types
        raise _in_plain_words(url, error) from error


def _in_plain_words(url: str, error: Exception) -> StorageError:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    kinds = {each.__name__ for each in type(error).__mro__}
    if isinstance(error, FileNotFoundError):
        return StorageError(f"there is nothing at {url}", "correct bucket, path or file name")
    if isinstance(error, ValueError) and "rotocol not known" in str(error):
        return StorageError(f"nothing here reads {url}: {said}", "use s3://, https:// or a path")
    if isinstance(error, PermissionError) or kinds & {"NoCredentialsError", "CredentialsError"}:
        return StorageError(
            f"the store refuses access to {url}: {said}",
            "check the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,"
            " AWS_ENDPOINT_URL) of the node that says so, and what they allow",
        )
    silent = {"HTTPClientError", "ConnectionError", "ClientConnectionError", "TimeoutError"}
    if isinstance(error, TimeoutError | ConnectionError) or kinds & silent:
        return StoreSilent(f"no answer for {url}: {said}", "the same command goes on")
    return StorageError(f"cannot use {url}: {said}", "")


@lru_cache(maxsize=32)
def _filesystem(protocol: str) -> Any:
    import fsspec

    return fsspec.filesystem(protocol, use_listings_cache=False)


def _open(url: str) -> tuple[Any, str]:
    assert is_url(url), url
    fs = _filesystem(url.partition("://")[0].lower())
    return fs, str(fs._strip_protocol(url))


def _check_bucket(fs: Any, url: str) -> None:
    protocol, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    if protocol in _BUCKETS and not fs.exists(bucket):
        raise StorageError(
            f"there is no bucket {protocol}://{bucket}, or these credentials do not see it",
            "correct the URL, or the credentials and endpoint in the environment",
        )


def _stored(info: dict[str, Any]) -> Stored:
    word = next((info[name] for name in _VERSIONS if info.get(name)), "")
    size = info.get("size")
    return Stored(-1 if size is None else int(size), str(word).strip('"'))


def _relative(name: str, base: str) -> str:
    """Empty for the one file that was asked for itself; never a path that leads elsewhere."""
    found = name.removeprefix(base.rstrip("/")).lstrip("/")
    if ".." in found.split("/"):
        raise StorageError(f"{name} has a part .. in its name", "rename the object")
    return found
