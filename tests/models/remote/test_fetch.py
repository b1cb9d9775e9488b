"""A file arrives whole, is the one that was listed, and is fetched once per node."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from models.errors import StorageError
from models.remote import fetch as module
from models.remote.fetch import fetch
from models.remote.store import Stored, get, look


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "store" / "weights"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def url_of(path: Path) -> str:
    return f"file://{path}"


def counting_get(log: Path, pause: float, url: str, target: Path) -> None:
    """Fetches, tells that it did, and takes its time."""
    with log.open("a") as lines:
        lines.write(f"{os.getpid()}\n")
    get(url, target)
    time.sleep(pause)


def fetch_with(replacement: Callable[[str, Path], None], url: str, target: Path) -> None:
    module.get = replacement
    fetch(url, look(url), target)


def started(
    replacement: Callable[[str, Path], None], url: str, target: Path
) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(
        target=fetch_with, args=(replacement, url, target)
    )
    process.start()
    return process


def test_a_file_is_fetched_once_however_many_processes_want_it(
    source: Path, tmp_path: Path
) -> None:
    target, log = tmp_path / "cache" / "weights", tmp_path / "log"
    slowly = partial(counting_get, log, 0.3)
    processes = [started(slowly, url_of(source), target) for _ in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(log.read_text().splitlines()) == 1
    assert target.read_bytes() == source.read_bytes()


def test_a_fetch_that_is_killed_leaves_no_file_and_the_next_one_cleans_up(
    source: Path, tmp_path: Path
) -> None:
    target, log = tmp_path / "cache" / "weights", tmp_path / "log"
    process = started(partial(counting_get, log, 60), url_of(source), target)
    while not list(target.parent.glob(".weights.*.tmp")):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not target.exists()
    fetch(url_of(source), look(url_of(source)), target)
    assert target.read_bytes() == source.read_bytes()
    assert not list(target.parent.glob("*.tmp"))


def test_a_file_that_changed_since_it_was_listed_is_refused(source: Path, tmp_path: Path) -> None:
    expected = look(url_of(source))
    source.write_bytes(b"other")
    with pytest.raises(StorageError, match="has changed since the run began: it had 1,048,576"):
        fetch(url_of(source), expected, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_another_size_in_the_cache_is_fetched_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    target.write_bytes(b"half")
    fetch(url_of(source), look(url_of(source)), target)
    assert target.read_bytes() == source.read_bytes()


class Line:
    """A connection that damages what comes over it, the first `bad` times."""

    def __init__(self, bad: int, *, alike: bool) -> None:
        self.bad, self.alike, self.times = bad, alike, 0

    def __call__(self, url: str, target: Path) -> None:
        get(url, target)
        self.times += 1
        if self.times <= self.bad:
            data = bytearray(target.read_bytes())
            data[0 if self.alike else self.times] ^= 1
            target.write_bytes(data)


MD5 = Stored(1 << 20, "0" * 32)


@pytest.fixture
def with_md5(source: Path, monkeypatch: pytest.MonkeyPatch) -> Stored:
    """A store whose versions are MD5s."""
    found = Stored(1 << 20, module.file_md5(source))
    monkeypatch.setattr(module, "look", lambda url: found)
    monkeypatch.setattr(module, "_other_words", set())
    return found


def test_damage_on_the_way_is_noticed_and_fetched_again(
    source: Path, with_md5: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(1, alike=False)
    monkeypatch.setattr(module, "get", line)
    fetch(url_of(source), with_md5, tmp_path / "weights")
    assert (line.times, (tmp_path / "weights").read_bytes()) == (2, source.read_bytes())


def test_damage_each_time_is_refused(
    source: Path, with_md5: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "get", Line(9, alike=False))
    with pytest.raises(StorageError, match="arrives with other bytes each time"):
        fetch(url_of(source), with_md5, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_an_etag_that_is_no_md5_is_found_out_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a bucket that encrypts: 32 digits that have nothing to do with the content."""
    line = Line(0, alike=True)
    monkeypatch.setattr(module, "get", line)
    monkeypatch.setattr(module, "look", lambda url: MD5)
    monkeypatch.setattr(module, "_other_words", set())
    for name in ("first", "second"):
        fetch(url_of(source), MD5, tmp_path / name)
    assert line.times == 3
