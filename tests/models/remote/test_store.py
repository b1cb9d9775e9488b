"""What a real S3 server and a plain web server give, and what they refuse."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.checkpoint import Checkpoint
from models.errors import StorageError
from models.remote import store as module
from models.remote.origin import catalogue
from models.remote.store import head, listed, look, put
from models.remote.texts import fetch_texts
from tests.s3 import Store, serving, talking_to
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving() as started, talking_to(started):
        started.bucket("bucket")
        started.bucket("bucket-of-others")
        for name in ("news/a.jsonl", "news/b.txt", "news/deep/c.jsonl", "newsreel/d.jsonl"):
            started.put(f"s3://bucket/{name}", name.encode())
        yield started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("s3://bucket/news", ["a.jsonl", "b.txt", "deep/c.jsonl"]),
        ("s3://bucket/news/", ["a.jsonl", "b.txt", "deep/c.jsonl"]),
        ("s3://bucket/news/*.jsonl", ["a.jsonl"]),
        ("s3://bucket/news/**/*.jsonl", ["a.jsonl", "deep/c.jsonl"]),
        ("s3://bucket/news/a.jsonl", [""]),
        ("s3://bucket/none", []),
        ("s3://bucket-of-others", []),
    ],
)
def test_files_of_a_folder_a_pattern_or_one_file(store: Store, url: str, names: list[str]) -> None:
    assert list(listed(url)) == names


@pytest.mark.slow
def test_an_object_has_its_size_and_md5(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 1000)
    sent = put(path, "s3://bucket/sent/weights")
    assert (sent.bytes, sent.md5) == (1000, hashlib.md5(b"x" * 1000).hexdigest())
    assert look("s3://bucket/sent/weights") == sent == listed("s3://bucket/sent")["weights"]
    assert head("s3://bucket/sent/weights", 3) == b"xxx"


@pytest.mark.slow
@pytest.mark.parametrize("url", ["s3://bucket-of-none/x", "s3://bucket-of-none"])
def test_a_bucket_that_is_not_there(store: Store, url: str) -> None:
    with pytest.raises(StorageError, match=r"there is nothing at s3://bucket-of-none"):
        listed(url)


@pytest.mark.slow
def test_text_is_fetched_once_and_again_when_it_changes(store: Store, tmp_path: Path) -> None:
    store.bucket("texts")
    store.put("s3://texts/a.jsonl", b"1")
    store.put("s3://texts/b.jsonl", b"2")
    store.put("s3://texts/c.bin", b"3")
    first, second = fetch_texts("s3://texts/*", tmp_path, (".jsonl",))
    times = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    store.put("s3://texts/b.jsonl", b"4")
    assert fetch_texts("s3://texts/*", tmp_path, (".jsonl",)) == [first, second]
    assert (first.read_bytes(), second.read_bytes()) == (b"1", b"4")
    assert first.stat().st_mtime_ns == times[0] and second.stat().st_mtime_ns != times[1]


def test_without_s3fs_the_remedy_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    module._filesystem.cache_clear()
    with pytest.raises(StorageError, match="s3:// URLs need a package that is missing") as caught:
        listed("s3://bucket/model")
    assert caught.value.remedy == "pip install 'coalesce-moe[s3]'"


class Quiet(SimpleHTTPRequestHandler):
    """Python's own web server: lists folders, knows no ranges."""

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def website(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    root = tmp_path / "site"
    root.mkdir()
    handler = partial(Quiet, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield root, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_checkpoint_opens_from_a_web_server(website: tuple[Path, str], tmp_path: Path) -> None:
    root, url = website
    local = Checkpoint.open(save_tiny(root / "model", "mixtral"))
    remote = Checkpoint.open(catalogue(f"{url}/model", tmp_path / "fetched", None))
    name = min(local.tensors)
    assert remote.tensors == local.tensors
    assert remote.read([name])[name].equal(local.read([name])[name])
    assert look(f"{url}/model/config.json").version
