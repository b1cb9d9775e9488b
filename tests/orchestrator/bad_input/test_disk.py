"""Disks that are full, before the run and in the middle of it."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import disk
from orchestrator.estimate import human
from orchestrator.load import load
from orchestrator.plan import summary
from orchestrator.preflight import prepare
from tests.orchestrator.refusals import assert_one_message, assert_refused
from tests.orchestrator.tiny_run import (
    WORDS,
    Command,
    Inputs,
    Outcome,
    snapshot,
    write_jsonl,
)

MOUNTABLE = shutil.which("mount") is not None and os.geteuid() == 0
# Report, logs, events and markers of a small run.
UNCOUNTED = 2_000_000


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many bytes, rounded to pages."""
    if not MOUNTABLE:
        pytest.skip("only root can mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()

    def mount(size: int) -> Path:
        options = f"size={size // 4096 * 4096}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("no disk can be mounted here")
        return path

    yield mount
    gc.collect()  # the traceback of a failed run still maps files of this disk
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def small_disk(mounted: Callable[[int], Path]) -> Path:
    """A file system of 400 kB."""
    return mounted(400 << 10)


def fill(disk: Path, free: int) -> Path:
    """Leaves so many bytes free."""
    filler, usage = disk / "filler", os.statvfs(disk)
    filler.write_bytes(b"x" * (usage.f_bavail * usage.f_frsize - free))
    return filler


def test_a_run_that_will_not_fit_on_the_disk_is_refused_with_numbers(
    coalesce: Command, inputs: Inputs, small_disk: Path
) -> None:
    needed = disk.peak_bytes(prepare(load(str(inputs.recipe())).config))
    assert 154_680 < needed < 300_000
    fill(small_disk, 64 << 10)
    recipe = inputs.recipe(run_dir=str(small_disk / "run"))
    words = f"needs up to {needed:,} bytes", "when all is written", "65,536 are free"
    assert_refused(coalesce, inputs, recipe, *words)
    assert not (small_disk / "run").exists()


# What takes most of the disk for a time, and what is said about it.
SCRATCH: dict[str, tuple[dict[str, Any], str]] = {
    "hidden states": (
        {"calibrate__engine": "streaming", "calibrate__data__tokens": 8192},
        "hidden states of 1 shards",
    ),
    "outputs of all experts": (
        {
            "calibrate__data__tokens": 300_000,
            "calibrate__sample": {"tokens": 300_000, "statistics_tokens": 300_000},
        },
        "all experts are evaluated",
    ),
    "carried streams": (
        {
            "group": {"method": "coalesce", "budget": {"keep_ratio": 0.5}},
            "refit": {"enabled": True, "target": "sequential"},
            "calibrate__data__tokens": 2048,
        },
        "refitted behind reduced",
    ),
}


@pytest.mark.parametrize(("changes", "words"), SCRATCH.values(), ids=SCRATCH)
def test_what_lies_there_only_for_a_time_needs_its_room_beside_what_stays(
    coalesce: Command,
    inputs: Inputs,
    mounted: Callable[[int], Path],
    changes: dict[str, Any],
    words: str,
) -> None:
    run = prepare(load(str(inputs.recipe(**changes))).config)
    peak = disk.peak_bytes(run)
    assert f"{human(peak)} of disk at the peak" in summary(run)
    # Copies of layer files would fit as well, so that the disk need not be asked for links.
    room = peak + disk.weight_bytes(run) + (1 << 16)
    place = mounted(room)
    filler = fill(place, peak - 4096 - peak % 4096)
    recipe = inputs.recipe(run_dir=str(place / "run"), **changes)
    assert disk.disk_bytes(run) < os.statvfs(place).f_bavail * 4096 < peak
    assert_refused(coalesce, inputs, recipe, f"needs up to {peak:,} bytes", words)
    filler.unlink()
    assert coalesce("validate", recipe).code == 0


def test_a_disk_is_asked_for_hard_links_where_copies_would_not_fit(
    coalesce: Command,
    inputs: Inputs,
    mounted: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tmpfs has them; no file system without them can be had here, so its answer is replaced."""
    run = prepare(load(str(inputs.recipe())).config)
    copies = disk.weight_bytes(run)
    place = mounted(disk.peak_bytes(run) + 16384)
    recipe = inputs.recipe(run_dir=str(place / "run"))
    assert coalesce("validate", recipe).code == 0
    assert list(place.iterdir()) == []

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    needed = f"needs up to {disk.peak_bytes(run) + copies:,} bytes"
    assert_refused(coalesce, inputs, recipe, needed, "no hard links")
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_run_with_all_kinds_of_scratch_files_fits_on_the_disk_that_it_asked_for(
    coalesce: Command, inputs: Inputs, mounted: Callable[[int], Path]
) -> None:
    rows = [{"text": " ".join(WORDS[i % 60 :] + WORDS[: i % 60])} for i in range(400)]
    write_jsonl(inputs.text, rows)
    changes = SCRATCH["carried streams"][0] | {
        "calibrate__engine": "streaming",
        "calibrate__data__tokens": 20_000,
        "calibrate__batch_size": 64,
        "calibrate__sample__tokens": 8000,
    }
    peak = disk.peak_bytes(prepare(load(str(inputs.recipe(**changes))).config))
    assert peak > 6 * UNCOUNTED
    place = mounted(peak + UNCOUNTED)
    outcome = coalesce("run", inputs.recipe(run_dir=str(place / "run"), **changes), "--quiet")
    assert outcome.code == 0, outcome.err


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
