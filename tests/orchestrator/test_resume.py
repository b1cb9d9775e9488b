"""A run may be killed at any moment: relaunching the same command gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = [
    "calibrate.data.tokens=10240",
    "calibrate.batch_size=4",
    "calibrate.sample.tokens=512",
    "refit.polish.steps=5",
    "evaluate.data.tokens=5120",
    "evaluate.baselines=[]",
    "evaluate.kl_positions=64",
]


def command(run_dir: Path, *overrides: str) -> list[str]:
    words = ["run", "quickstart", "--quiet", f"run_dir={run_dir}", *SMALL, *overrides]
    return [sys.executable, "-m", "orchestrator", *words]


def finish(run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(run_dir, *overrides), cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def bytes_of(run_dir: Path) -> dict[str, str]:
    """Digest of everything that a user keeps."""
    kept = [run_dir / "statistics.arrow", run_dir / "decision.arrow"]
    folders = ("output", "layers", "calibration/inputs", "calibration/subsample")
    kept += [p for folder in folders for p in (run_dir / folder).iterdir()]
    markers = (".safetensors.json", ".arrow.json")
    kept = [path for path in kept if not path.name.endswith(markers)]
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
    return {str(path.relative_to(run_dir)): digest for path, digest in digests.items()}


def kill_when(run_dir: Path, pattern: str, *overrides: str) -> None:
    """Starts a run and kills it, its children included, once a file matches."""
    process = subprocess.Popen(
        command(run_dir, *overrides),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while not any(run_dir.glob(pattern)):
        assert process.poll() is None, f"the run ended before {pattern} appeared"
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    done = finish(run_dir, "executor.kind=local")
    assert done.returncode == 0, done.stderr
    return run_dir


# In the order in which a run comes to them.
KILL_POINTS = {
    "while claiming the folder": "config.yaml",
    "while tokenising": "run.json",
    "between calibration shards": "calibration/shards/shard-00001.arrow.json",
    "between joined inputs": "calibration/inputs/layer-00002.safetensors",
    "while all experts are evaluated": "calibration/subsample/layer-00002.arrow",
    "after the statistics": "statistics.arrow",
    "between layers": "layers/layer-00002.safetensors",
    "while assembling": ".output.*.tmp",
    "after assembling": "output/config.json",
    "while measuring": "evaluation/compressed/*.json",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_local_run_killed_at_ten_moments_is_finished_with_identical_bytes(
    tmp_path: Path, uninterrupted: Path
) -> None:
    """Every start goes on where the one before was killed."""
    run_dir = tmp_path / "run"
    for pattern in KILL_POINTS.values():
        kill_when(run_dir, pattern, "executor.kind=local")
    assert not list(run_dir.glob("report/*"))
    done = finish(run_dir, "executor.kind=local")
    assert done.returncode == 0, done.stderr
    assert bytes_of(run_dir) == bytes_of(uninterrupted)
    assert not list(run_dir.rglob("*.tmp"))


SEQUENTIAL = ("executor.kind=local", "evaluate=null", "refit.target=sequential")
CHAIN_KILL_POINTS = {
    "while streams are carried": "refit/block-00001/.part-*.tmp/compressed",
    "between parts of the text": "refit/block-00002/part-00001.safetensors.json",
    "between blocks of layers": "layers/layer-00002.safetensors.json",
}


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("sequential") / "run"
    done = finish(run_dir, *SEQUENTIAL)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("pattern", CHAIN_KILL_POINTS.values(), ids=CHAIN_KILL_POINTS)
def test_a_run_killed_while_it_refits_in_turn_is_finished_with_identical_bytes(
    tmp_path: Path, sequential: Path, pattern: str
) -> None:
    run_dir = tmp_path / "run"
    kill_when(run_dir, pattern, *SEQUENTIAL)
    done = finish(run_dir, *SEQUENTIAL)
    assert done.returncode == 0, done.stderr
    assert bytes_of(run_dir) == bytes_of(sequential)
    assert not list(run_dir.rglob("*.tmp")) and not (run_dir / "refit").exists()


@pytest.mark.slow
def test_a_run_killed_while_it_streams_is_finished_by_the_other_engine(
    tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir, hidden = tmp_path / "run", "calibration/shards/.shard-00001.*/batch-00000"
    kill_when(run_dir, hidden, "executor.kind=local", "calibrate.engine=streaming")
    done = finish(run_dir, "executor.kind=local", "calibrate.engine=resident")
    assert done.returncode == 0, done.stderr
    assert bytes_of(run_dir) == bytes_of(uninterrupted)
    assert not list(run_dir.rglob("*.tmp"))


@pytest.mark.slow
def test_a_run_killed_on_two_ray_workers_is_finished_by_one(
    tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir = tmp_path / "run"
    ray = "executor.kind=ray"
    kill_when(run_dir, "calibration/shards/shard-00001.arrow.json", ray, "executor.workers=2")
    done = finish(run_dir, ray, "executor.workers=1")
    assert done.returncode == 0, done.stderr
    assert bytes_of(run_dir) == bytes_of(uninterrupted)


@pytest.mark.slow
def test_two_ray_workers_give_the_bytes_of_the_local_executor(
    tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir = tmp_path / "run"
    done = finish(run_dir, "executor.kind=ray", "executor.workers=2")
    assert done.returncode == 0, done.stderr
    assert bytes_of(run_dir) == bytes_of(uninterrupted)


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(uninterrupted: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*.safetensors")}
    events = uninterrupted / "events.jsonl"
    start = len(events.read_text().splitlines())
    assert finish(uninterrupted, "executor.kind=local").returncode == 0
    later = [json.loads(line) for line in events.read_text().splitlines()[start:]]
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*.safetensors")} == before
    done = [event for event in later if event["event"] == "unit_done" and "resumed" in event]
    assert done and all(event["resumed"] for event in done)
    assert any(event["event"] == "resuming" for event in later)


@pytest.mark.slow
def test_a_flipped_bit_in_a_finished_layer_is_found_and_repaired(
    tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir = tmp_path / "run"
    # With its hard links: the layer and the output are one file.
    subprocess.run(["cp", "-a", uninterrupted, run_dir], check=True)
    layer = run_dir / "layers" / "layer-00001.safetensors"
    output = run_dir / "output" / "model-00002-of-00006.safetensors"
    damaged = bytearray(layer.read_bytes())
    damaged[-5] ^= 0x10
    layer.write_bytes(damaged)
    assert output.read_bytes() == damaged
    done = finish(run_dir, "executor.kind=local")
    assert done.returncode == 0, done.stderr
    assert bytes_of(run_dir) == bytes_of(uninterrupted)
    assert output.read_bytes() == layer.read_bytes()
