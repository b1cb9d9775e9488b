"""A file is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from models import atomic
from models.errors import DiskFull


def test_a_finished_write_leaves_only_the_file(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / "new" / "file", b"content")

    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    assert os.listdir(tmp_path / "new") == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    with pytest.raises(RuntimeError, match="half way"), atomic.staged(path) as temporary:
        temporary.write_bytes(b"ne")
        raise RuntimeError("half way")

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_file_does_not_exist_before_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"

    with atomic.staged(path) as temporary:
        temporary.write_bytes(b"content")
        assert not path.exists()

    assert path.read_bytes() == b"content"


def test_content_reaches_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))

    atomic.write_bytes(tmp_path / "file", b"content")

    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["errno", "text"],
)
def test_a_full_disk_is_told_from_other_errors(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskFull, match="bytes free"), atomic.staged(tmp_path / "file"):
        raise error

    assert os.listdir(tmp_path) == []


def test_another_os_error_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic.staged(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "denied")


def test_json_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a", {"x": 1, "y": [2.5]})
    atomic.write_json(tmp_path / "b", {"y": [2.5], "x": 1})

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text()) == {"x": 1, "y": [2.5]}


def test_text_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert atomic.text_digest({"x": 1, "y": 2}) == atomic.text_digest({"y": 2, "x": 1})
    assert atomic.text_digest({"x": 1}) != atomic.text_digest({"x": 2})


def test_file_digest_is_the_sha256_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_CHUNK", 7)
    content = bytes(range(256))
    (tmp_path / "file").write_bytes(content)

    assert atomic.file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_quick_digest_reads_small_files_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")

    assert atomic.quick_digest(tmp_path / "file") == atomic.file_digest(tmp_path / "file")


@pytest.mark.parametrize("position", [0, 500, 999])
def test_quick_digest_of_a_large_file_sees_head_middle_and_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    monkeypatch.setattr(atomic, "_WHOLE", 100)
    monkeypatch.setattr(atomic, "_SAMPLE", 16)
    path, content = tmp_path / "file", bytearray(1000)
    path.write_bytes(content)
    before = atomic.quick_digest(path)

    content[position] = 1
    path.write_bytes(content)

    assert atomic.quick_digest(path) != before


def test_quick_digest_of_a_large_file_depends_on_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_WHOLE", 100)
    monkeypatch.setattr(atomic, "_SAMPLE", 16)
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").write_bytes(bytes(1001))

    assert atomic.quick_digest(tmp_path / "a") != atomic.quick_digest(tmp_path / "b")


def test_link_shares_the_content(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")

    atomic.link_or_copy(tmp_path / "source", tmp_path / "target")

    assert (tmp_path / "target").samefile(tmp_path / "source")


def test_a_file_is_copied_where_no_link_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(b"content")

    atomic.link_or_copy(tmp_path / "source", tmp_path / "target")

    assert (tmp_path / "target").read_bytes() == b"content"
    assert not (tmp_path / "target").samefile(tmp_path / "source")


def test_attempts_on_two_hosts_do_not_write_to_one_temporary_file(tmp_path: Path) -> None:
    """Process ids repeat: a host that was cut off may have the same one."""
    with atomic.staged(tmp_path / "x") as temporary:
        temporary.write_bytes(b"x")
        assert f".{os.uname().nodename}-{os.getpid()}." in temporary.name
