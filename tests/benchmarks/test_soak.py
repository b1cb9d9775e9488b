"""The soak injects what it says, and its comparison can fail."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.disturb import AT_REST, KINDS

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(900)
def test_a_short_soak_ends_with_identical_bytes() -> None:
    words = ["--faults", "4", "--seed", "7", "--quick"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["identical"] is True
    assert found["faults"] == sum(found["by_kind"].values()) == 4
    assert found["runs"] >= 1


@pytest.mark.parametrize("kind", AT_REST)
def test_damage_is_done_where_there_is_a_file_and_nowhere_else(tmp_path: Path, kind: str) -> None:
    assert KINDS[kind](random.Random(0), 0, [], tmp_path) is None
    (tmp_path / "output").mkdir()
    files = [tmp_path / "output" / "model.safetensors", tmp_path / "events.jsonl"]
    for path in files:
        path.write_bytes(b"0123456789")
    fault = KINDS[kind](random.Random(0), 0, [], tmp_path)
    assert fault is not None
    changed = [path for path in files if not path.exists() or path.read_bytes() != b"0123456789"]
    assert changed == [files[kind == "truncate_events"]]


@pytest.mark.parametrize("kind", ["kill_worker", "stop_worker"])
def test_without_workers_none_is_disturbed(tmp_path: Path, kind: str) -> None:
    assert KINDS[kind](random.Random(0), 0, [], tmp_path) is None
