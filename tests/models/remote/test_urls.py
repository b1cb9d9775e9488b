"""Which URLs are used, and that a refusal never repeats what may be a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.remote.urls import UrlError, check_url, is_url, pattern_root, was_url


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:planted@bucket/model",
        "s3://planted@bucket/model",
        "https://user:planted@host/model",
        "https://host/model?X-Amz-Signature=planted",
        "simplecache::s3://bucket/planted",
        "memory://planted",
    ],
)
def test_what_holds_secrets_or_cannot_be_shared_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(UrlError, match=r"^model\.path") as caught:
        check_url("model.path", url)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/a@b/*.jsonl", "file:///folder", "https://host/a"])
def test_plain_urls_pass(url: str) -> None:
    check_url("model.path", url)


def test_a_url_is_told_from_paths_and_hub_names() -> None:
    assert is_url("s3://bucket/prefix") and is_url("file:///folder")
    assert not any(map(is_url, ["/folder", "owner/name", "./a:b", "~/c"]))
    assert was_url(Path("s3://bucket/run")) and not was_url(Path("/runs/s3:/x"))


def test_a_pattern_begins_where_its_first_wildcard_part_does() -> None:
    assert pattern_root("s3://bucket/news/2024-*/x.jsonl") == "s3://bucket/news"
    assert pattern_root("s3://bucket/news/x.jsonl") is None
