"""A target holds a whole checkpoint, or nothing that opens as one; and belongs to one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.atomic import file_digest, write_json
from models.errors import StorageError
from stages.unit import beside, execute, read_marker
from stages.upload.stage import (
    CLAIM,
    LAST,
    UploadUnit,
    check_complete,
    check_target,
    claim,
    forget_stale,
    plan,
    run_one,
)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What an export leaves, with the model card of the report."""
    folder = tmp_path / "output"
    folder.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", LAST, "zz.txt"):
        (folder / name).write_bytes(name.encode() * 1000)
    digests = {p.name: {"sha256": file_digest(p)} for p in folder.iterdir()}
    write_json(beside(folder), {"outputs": digests})
    (folder / "README.md").write_text("card")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "store" / "prefix"


@pytest.fixture
def units(output: Path, target: Path, tmp_path: Path) -> list[UploadUnit]:
    return plan(output, f"file://{target}", tmp_path / "upload")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_that_makes_a_checkpoint_comes_last(units: list[UploadUnit], output: Path) -> None:
    assert [unit.source.name for unit in units][-1] == LAST
    assert sorted(unit.source.name for unit in units) == names(output)


def test_what_was_sent_is_not_sent_again_and_what_was_lost_is(
    units: list[UploadUnit], target: Path
) -> None:
    for unit in units[:3]:
        assert not execute(unit, run_one).resumed
    (target / units[1].source.name).unlink()
    (target / units[2].source.name).write_bytes(b"damaged")
    forget_stale(units)
    assert [read_marker(unit) is not None for unit in units] == [True, False, False, False, False]
    with pytest.raises(StorageError, match=f"{units[1].source.name} was sent to .* is not there"):
        check_complete(units[:-1])
    assert [execute(unit, run_one).resumed for unit in units] == [True] + [False] * 4
    check_complete(units)
    assert all((target / u.source.name).read_bytes() == u.source.read_bytes() for u in units)


def test_a_new_model_card_is_sent_again(
    units: list[UploadUnit], output: Path, target: Path, tmp_path: Path
) -> None:
    for unit in units:
        execute(unit, run_one)
    (output / "README.md").write_text("another card")
    again = plan(output, f"file://{target}", tmp_path / "upload")
    forget_stale(again)
    assert [u.source.name for u in again if read_marker(u) is None] == ["README.md"]


def test_a_target_that_holds_anything_is_refused_and_left_alone(
    target: Path, tmp_path: Path
) -> None:
    target.mkdir(parents=True)
    (target / "theirs").write_text("x")
    for ask in (check_target, claim):
        with pytest.raises(StorageError, match=r"is not empty .* 1 file\(s\), first theirs"):
            ask(f"file://{target}", tmp_path / "upload")
    assert names(target) == ["theirs"]


def test_a_target_belongs_to_the_run_that_claimed_it(target: Path, tmp_path: Path) -> None:
    url = f"file://{target}"
    check_target(url, tmp_path / "upload")
    assert not target.exists()
    for _ in range(2):
        claim(url, tmp_path / "upload")
    assert names(target) == [CLAIM]
    with pytest.raises(StorageError, match="does not belong to this run"):
        claim(url, tmp_path / "another")


def test_a_claim_that_is_no_json_is_not_ours(target: Path, tmp_path: Path) -> None:
    claim(f"file://{target}", tmp_path / "upload")
    (target / CLAIM).write_text("{")
    with pytest.raises(StorageError, match="does not belong to this run"):
        check_target(f"file://{target}", tmp_path / "upload")
