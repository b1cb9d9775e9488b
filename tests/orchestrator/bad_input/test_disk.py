"""Disks that are full, before the run and in the middle of it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import disk
from orchestrator.estimate import human
from orchestrator.load import load
from orchestrator.plan import summary
from orchestrator.preflight import prepare
from tests.orchestrator.refusals import assert_one_message, assert_refused
from tests.orchestrator.tiny_run import (
    Command,
    Inputs,
    Outcome,
    snapshot,
)

MOUNTABLE = shutil.which("mount") is not None and os.geteuid() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    if not MOUNTABLE:
        pytest.skip("only root can mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here")
    yield path
    gc.collect()  # the traceback of a failed run still maps files of this disk
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path, free: int) -> Path:
    """Leaves so many bytes free."""
    filler, usage = disk / "filler", os.statvfs(disk)
    filler.write_bytes(b"x" * (usage.f_bavail * usage.f_frsize - free))
    return filler


def test_a_run_that_will_not_fit_on_the_disk_is_refused_with_numbers(
    coalesce: Command, inputs: Inputs, small_disk: Path
) -> None:
    fill(small_disk, 64 << 10)
    recipe = inputs.recipe(run_dir=str(small_disk / "run"))
    assert_refused(coalesce, inputs, recipe, "will write 154,680 bytes", "65,536 are free")
    assert not (small_disk / "run").exists()


def test_hidden_states_that_will_not_fit_are_refused_with_numbers(
    coalesce: Command, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 tokens in two shards, 32 values of 4 bytes each: streamed one after the other."""
    usage = shutil.disk_usage("/")._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    monkeypatch.setattr(disk, "disk_bytes", lambda _run: 0)
    recipe = inputs.recipe(calibrate__engine="streaming")
    words = "hidden states of 1 shards at a time, 32,768 bytes", "30,000 are free"
    assert_refused(coalesce, inputs, recipe, *words)
    assert not inputs.run_dir.exists()


@pytest.mark.parametrize(("executor", "shards"), [({"workers": 3}, 2), ({"workers": 1}, 1)])
def test_the_plan_shows_the_hidden_states_of_all_workers(
    inputs: Inputs, executor: dict[str, int], shards: int
) -> None:
    recipe = inputs.recipe(calibrate__engine="streaming", executor={"kind": "ray"} | executor)
    run = prepare(load(str(recipe)).config)
    assert disk.hidden_bytes(run) == shards * 32_768
    words = f"hidden states of {shards} shards at a time take up to {human(shards * 32_768)} of"
    assert words in summary(run)


def test_a_resident_run_keeps_no_hidden_states(inputs: Inputs) -> None:
    run = prepare(load(str(inputs.recipe(calibrate__engine="resident"))).config)
    assert disk.hidden_bytes(run) == 0
    assert "hidden states" not in summary(run)


@pytest.fixture
def optimist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space as it was before somebody else filled the disk."""
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)


def assert_disk_full(outcome: Outcome, run_dir: Path) -> None:
    assert_one_message(outcome, "no space left on the device while writing", str(run_dir))
    assert "run the same command again" in outcome.err
    assert not [path for path in snapshot(run_dir.parent) if path.endswith(".tmp")]


@pytest.mark.parametrize("pages", [0, 1, 3, 6, 9, 12, 18, 24])
@pytest.mark.usefixtures("optimist")
def test_a_disk_that_fills_up_leaves_no_temporary_file(
    coalesce: Command, inputs: Inputs, small_disk: Path, pages: int
) -> None:
    run_dir = small_disk / "run"
    fill(small_disk, pages << 12)
    assert_disk_full(coalesce("run", inputs.recipe(run_dir=str(run_dir)), "--quiet"), run_dir)


def test_an_event_that_finds_no_space_is_reported_like_any_other_write(
    coalesce: Command, inputs: Inputs
) -> None:
    inputs.run_dir.mkdir()
    (inputs.run_dir / "events.jsonl").symlink_to("/dev/full")
    assert_disk_full(coalesce("run", inputs.recipe(), "--quiet"), inputs.run_dir)


@pytest.mark.slow
@pytest.mark.usefixtures("optimist")
def test_a_run_goes_on_once_there_is_space_again(
    coalesce: Command, inputs: Inputs, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    recipe = inputs.recipe(run_dir=str(run_dir), model__verify="full", calibrate__sample=None)
    filler = fill(small_disk, 96 << 10)
    assert_disk_full(coalesce("run", recipe, "--quiet"), run_dir)
    finished_before = len(list(run_dir.glob("calibration/shards/*.json")))
    filler.unlink()
    outcome = coalesce("run", recipe)
    assert outcome.code == 0, outcome.err
    assert finished_before == 2
    assert "calibrate: resuming: 2/2 done" in outcome.out


def test_a_run_folder_that_cannot_be_written_is_refused(
    coalesce: Command, inputs: Inputs, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    recipe = inputs.recipe(run_dir=str(small_disk / "run"))
    assert_refused(coalesce, inputs, recipe, f"nothing can be written to {small_disk}", "run_dir")


def test_a_run_folder_below_a_file_is_refused(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe(run_dir=str(inputs.text / "run"))
    assert_refused(coalesce, inputs, recipe, "nothing can be written to", "text.jsonl", "run_dir")
