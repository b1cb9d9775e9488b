"""What a URL is, and which ones are refused. Imports nothing but the standard library."""

from __future__ import annotations

import re
from hashlib import sha256
from urllib.parse import urlsplit

from models.errors import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# A URL that went through `pathlib`, which makes one slash of two.
_MANGLED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")
_PATTERN = re.compile(r"[*?\[]")


class UrlError(UserError):
    """A URL that is not used. The message never holds the URL itself: it may hold a secret."""


def is_url(text: str) -> bool:
    """Whether this names a place by its protocol, not by a path of this machine."""
    return _URL.match(text) is not None


def was_url(path: object) -> bool:
    """Whether a path is what `pathlib` made of a URL."""
    return _MANGLED.match(str(path)) is not None


def check_url(key: str, url: str) -> None:
    """Refuses what cannot be shared with other processes, or would put a secret into files.

    Args:
        key: of the config, for the message.

    Raises:
        UrlError: a chain of protocols, memory://, or credentials within the URL.
    """
    protocol = url.partition("://")[0].lower()
    if "::" in url:
        raise UrlError(f"{key} chains several protocols", "give the URL of the files alone")
    if protocol == "memory":
        raise UrlError(
            f"{key} is a memory:// URL, which no other process can read", "use file:// or s3://"
        )
    query = protocol in ("http", "https") and urlsplit(url).query
    if "@" in _authority(url) or query:
        raise UrlError(
            f"{key} holds credentials or a query string, which would land in the run folder",
            "put credentials into the environment (AWS_ACCESS_KEY_ID, ...)",
        )


def pattern_root(url: str) -> str | None:
    """The part of a pattern before its first wildcard component; None for a plain URL."""
    if _PATTERN.search(url) is None:
        return None
    return url[: _first_wildcard(url)].rpartition("/")[0]


def url_key(text: str) -> str:
    """A short name for a folder that belongs to this text alone."""
    return sha256(text.encode()).hexdigest()[:16]


def _first_wildcard(url: str) -> int:
    found = _PATTERN.search(url)
    assert found is not None
    return found.start()


def _authority(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]
