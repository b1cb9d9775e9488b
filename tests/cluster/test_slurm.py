"""Runs as jobs of a real Slurm of two nodes: interrupted in every way, the same bytes at last."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.events import read_events
from tests.cluster.slurm_lab.lab import (
    REPOSITORY,
    SMALL,
    Lab,
    bring_up,
    logs_of,
    take_down,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]
SECRETS = {
    "HF_TOKEN": "hf_planted4a1c9e7d20",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED7Q2XK9",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+8f3b6a91c0",
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    # Not below pytest's folder: a munge socket's path has 107 letters.
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    try:
        yield bring_up(folder)
    finally:
        take_down(folder)


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Bytes of the same run in one process."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    words = ["run", "quickstart", "--quiet", f"run_dir={run_dir}", *SMALL, "executor.kind=local"]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0
    return bytes_of(run_dir)


def bytes_of(run_dir: Path) -> dict[str, str]:
    """Digest of everything that a user keeps."""
    kept = [run_dir / "statistics.arrow", run_dir / "decision.arrow"]
    kept += [path for path in (run_dir / "output").iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def shards(run_dir: Path) -> int:
    return len(list((run_dir / "calibration" / "shards").glob("*.json")))


def hold(lab: Lab, run_dir: Path, more_than: int = 0) -> int:
    """Stops the workers in the middle of calibration, so that the run waits for what comes next."""
    until(lambda: shards(run_dir) > more_than, "a shard is done", 240)
    assert lab.signal_workers(signal.SIGSTOP)
    done = shards(run_dir)
    assert done < 40, "the run was too fast to be held"
    return done


def test_a_job_of_two_nodes_gives_the_bytes_of_one_process_beside_a_blind_one(
    lab: Lab, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Two jobs share both nodes; the second has a model that one of them does not see."""
    run_dir, blind = tmp_path / 'it\'s 100% $HOME "of" mine' / "run", tmp_path / "blind"
    model = shutil.copytree(REPOSITORY / "examples" / "bundled" / "model", tmp_path / "model")
    lab.on("n2", "mount", "-t", "tmpfs", "tmpfs", model.parent / "model")
    gpus = ("slurm.gpus_per_node=1", "executor.gpus_per_worker=1")
    job = lab.submit(run_dir, *gpus, **SECRETS)
    other = lab.submit(blind, f"model.path={model}")
    lab.await_state(job, "RUNNING")
    lab.await_state(other, "RUNNING")
    assert lab.await_end(job) == "COMPLETED 0 0:0", logs_of(run_dir)
    assert bytes_of(run_dir) == undisturbed
    assert leaked(run_dir) == []
    assert lab.await_end(other) == "FAILED 0 2:0", logs_of(blind)
    assert f"error: {model} has other contents on n2 (10.77.0.12)" in logs_of(blind)
    for node in ("n1", "n2"):
        assert not lab.on(node, "pgrep", "-f", "raylet|gcs_server", check=False)
    assert not list(Path("/tmp").glob(f"coalesce-{job}-*"))


def leaked(folder: Path) -> list[str]:
    """Files that hold a planted secret."""
    return [
        f"{name} in {path}"
        for path in folder.rglob("*")
        if path.is_file()
        for name, value in SECRETS.items()
        if value.encode() in path.read_bytes()
    ]


def test_a_warned_job_ends_its_units_and_goes_on_with_fewer_nodes(
    lab: Lab, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = lab.submit(run_dir, "slurm.lead_seconds=90")
    hold(lab, run_dir)
    lab.on("ctl", "scancel", "--batch", "--signal=USR1", job)
    until(lambda: "got SIGUSR1" in logs_of(run_dir), "the launcher heard", 30)
    lab.signal_workers(signal.SIGCONT)
    lab.await_state(job, "PENDING 1")
    assert "stopped by SIGUSR1; finished units are kept" in logs_of(run_dir)
    assert "ending them" not in logs_of(run_dir)
    lab.on("ctl", "scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1")
    assert lab.await_end(job) == "COMPLETED 1 0:0", logs_of(run_dir)
    assert "1 nodes: n" in logs_of(run_dir)
    assert bytes_of(run_dir) == undisturbed
    assert stopped(run_dir) == [75]


def stopped(run_dir: Path) -> list[int]:
    events = read_events(run_dir / "events.jsonl")
    return [event["code"] for event in events if event["event"] == "run_stopped"]


def test_a_job_at_its_time_limit_ends_hung_units_and_starts_itself_again(
    lab: Lab, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # On a slow machine a start may reach its limit before it has finished a shard.
    job = lab.submit(run_dir, "slurm.time='1'", "slurm.fruitless_starts=10")
    hold(lab, run_dir)
    restarts = int(lab.state(job).split()[1])
    # Ray takes a worker that stands still for dead after half a minute, and makes another.
    until(
        lambda: (
            lab.signal_workers(signal.SIGSTOP) == 0
            and lab.state(job).startswith(f"PENDING {restarts + 1}")
        ),
        "the job has requeued itself",
        240,
    )
    assert "got SIGUSR1" in logs_of(run_dir)
    assert "ending them" in logs_of(run_dir)
    lab.on("ctl", "scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert lab.await_end(job) == f"COMPLETED {restarts + 1} 0:0", logs_of(run_dir)
    assert bytes_of(run_dir) == undisturbed
    assert stopped(run_dir)[-1] == 143


def test_a_job_that_is_preempted_requeued_and_loses_its_head_goes_on(
    lab: Lab, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = lab.submit(run_dir)
    done = hold(lab, run_dir)
    urgent = ["--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    lab.on("ctl", "sbatch", *urgent, "--wrap=sleep 1")
    lab.await_state(job, "PENDING 1")
    done = hold(lab, run_dir, done)
    lab.on("ctl", "scontrol", "requeue", job)
    lab.await_state(job, "PENDING 2")
    hold(lab, run_dir, done)
    assert lab.end_head() == 1
    lab.await_state(job, "PENDING 3")
    assert "Ray ended on the nodes" in logs_of(run_dir)
    assert lab.await_end(job) == "COMPLETED 3 0:0", logs_of(run_dir)
    assert bytes_of(run_dir) == undisturbed


def test_a_node_that_does_not_join_is_named_and_the_job_gives_up(lab: Lab, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lab.on("n2", "mount", "-t", "tmpfs", "tmpfs", run_dir)
    job = lab.submit(run_dir, "slurm.join_seconds=40", "slurm.fruitless_starts=1")
    assert lab.await_end(job) == "FAILED 0 75:0", logs_of(run_dir)
    said = logs_of(run_dir)
    assert "1 of 2 nodes missing after" in said
    assert "n2 did not report at all (not started, or the run folder is not shared with it)" in said
    assert "1 starts in a row finished no unit: not requeued" in said
    assert not (run_dir / "run.json").exists()


def test_a_cancelled_job_stays_cancelled(lab: Lab, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = lab.submit(run_dir)
    until(lambda: (run_dir / "slurm" / f"nodes-{job}.log").exists(), "started", 60)
    lab.on("ctl", "scancel", job)
    assert lab.await_end(job).startswith("CANCELLED 0")
    until(lambda: not lab.on("ctl", "squeue", "--noheader"), "the job is gone", 60)
    assert "requeueing" not in logs_of(run_dir)


def test_what_run_would_refuse_is_refused_before_it_is_submitted(lab: Lab, tmp_path: Path) -> None:
    words = ["submit", "slurm", "quickstart", f"run_dir={tmp_path / 'run'}"]
    refused = lab.coalesce(*words, "slurm.cpus_per_task=1", "group.budget.keep_ratio=0.01")
    assert refused.returncode == 2
    assert "budget" in refused.stderr
    assert not (tmp_path / "run").exists()
    unknown = lab.coalesce(*words, "slurm.cpus_per_task=1", "slurm.partition=nowhere")
    assert unknown.returncode == 2
    assert "Slurm refuses the job: " in unknown.stderr
    assert lab.on("ctl", "squeue", "--noheader") == ""
