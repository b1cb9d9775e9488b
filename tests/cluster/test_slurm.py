"""Runs as jobs of a real Slurm of two nodes: interrupted in every way, the same bytes at last."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from models.arrow import read_table
from orchestrator.events import read_events
from orchestrator.load import load
from orchestrator.preflight import prepare
from orchestrator.run import run
from tests.cluster.slurm_lab.lab import (
    REPOSITORY,
    SMALL,
    Lab,
    bring_up,
    logs_of,
    take_down,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(2400)]
STORE = "tests.cluster.slurm_lab.store"
# Ray takes a worker that stands still for dead after half a minute, and the units of a run that is
# asked to stop are then at an end by themselves; with these it waits.
PATIENT = dict.fromkeys(
    ("RAY_grpc_keepalive_timeout_ms", "RAY_grpc_client_keepalive_timeout_ms"), "3600000"
)
SECRETS = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    # Not below pytest's folder: a munge socket's path has 107 letters.
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    try:
        yield bring_up(folder)
    finally:
        take_down(folder)


@pytest.fixture(scope="module")
def reference(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        run(
            prepare(
                load("quickstart", [f"run_dir={run_dir}", *SMALL, "executor.kind=local"]).config
            )
        )
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(reference: Path) -> dict[str, str]:
    """Its bytes."""
    return bytes_of(reference)


def bytes_of(run_dir: Path) -> dict[str, str]:
    """Digest of everything that a user keeps."""
    kept = [run_dir / "statistics.arrow", run_dir / "decision.arrow"]
    kept += [path for path in (run_dir / "output").iterdir() if path.is_file()]
    return {path.name: digest(path) for path in kept}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shards(run_dir: Path) -> int:
    return len(list((run_dir / "calibration" / "shards").glob("*.json")))


def hold(lab: Lab, run_dir: Path, more_than: int = 0) -> int:
    """Stops the workers in the middle of calibration, so that the run waits for what comes next.

    Those of an earlier start that Slurm woke to end them may have finished a shard more, so that
    enough are done before this start has workers.
    """
    until(
        lambda: shards(run_dir) > more_than and lab.signal_workers(signal.SIGSTOP),
        "a shard is done, and workers were stopped",
    )
    done = shards(run_dir)
    assert done < 40, "the run was too fast to be held"
    return done


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a user of an S3 server on the login node, which checks keys and holds the
    model below s3://lab/model."""
    ready = tmp_path_factory.mktemp("store") / "ready.json"
    model = REPOSITORY / "examples" / "bundled" / "model"
    words = [sys.executable, "-m", STORE, "serve", lab.address("ctl"), model, ready]
    with lab.running("ctl", *words):
        until(ready.exists, "the S3 server is up", 120)
        yield json.loads(ready.read_text())


def test_a_job_on_two_nodes_from_and_to_s3_beside_one_that_sees_another_model(
    lab: Lab, reference: Path, store: dict[str, str], tmp_path: Path
) -> None:
    """Two jobs share both nodes; the second has a model that one of them does not see."""
    run_dir, blind = tmp_path / 'it\'s 100% $HOME "of" mine' / "run", tmp_path / "blind"
    model = shutil.copytree(REPOSITORY / "examples" / "bundled" / "model", tmp_path / "model")
    lab.on("n2", "mount", "-t", "tmpfs", "tmpfs", model.parent / "model")
    gpus = ("slurm.gpus_per_node=1", "executor.gpus_per_worker=1")
    remote = ("model.path=s3://lab/model", "upload.url=s3://lab/out")
    cache = f"cache.dir={tmp_path}/cache-$SLURMD_NODENAME"
    secrets = store | {"HF_TOKEN": "hf_planted4a1c9e7d20"}
    job = lab.submit_by_command(run_dir, *gpus, *remote, cache, **secrets)
    other = lab.submit(blind, f"model.path={model}")
    lab.await_state(job, "RUNNING")
    lab.await_state(other, "RUNNING")
    assert lab.await_end(job) == "COMPLETED 0 0:0", logs_of(run_dir)
    assert_made_as(reference, run_dir)
    output = {path.name: digest(path) for path in (run_dir / "output").iterdir()}
    sent = json.loads(lab.on("ctl", sys.executable, "-m", STORE, "list", "s3://lab/out", **store))
    assert {name: sent[name] for name in sent if name != "coalesce.json"} == output
    # With keys that came from the environment every node has fetched the weights for itself.
    assert {path.parts[-3] for path in tmp_path.glob("cache-*/*/*.safetensors")} == {
        "cache-n1",
        "cache-n2",
    }
    assert leaked(tmp_path, [secrets[name] for name in SECRETS]) == []
    assert lab.await_end(other) == "FAILED 0 2:0", logs_of(blind)
    assert f"error: {model} has other contents on n2 (10.77.0.12)" in logs_of(blind)
    for node in ("n1", "n2"):
        assert not lab.on(node, "pgrep", "-f", "raylet|gcs_server", check=False)
    assert not list(Path("/tmp").glob(f"coalesce-{job}-*"))


def assert_made_as(reference: Path, run_dir: Path) -> None:
    """The same but for where the model came from, which card and tables tell."""
    for name in ("statistics.arrow", "decision.arrow"):
        assert read_table(run_dir / name).equals(read_table(reference / name))
    for path in (reference / "output").iterdir():
        if path.name != "README.md":
            assert digest(run_dir / "output" / path.name) == digest(path), path.name


def leaked(folder: Path, values: Sequence[str]) -> list[str]:
    """Files that hold a planted secret."""
    return [
        f"{value} in {path}"
        for path in folder.rglob("*")
        if path.is_file()
        for value in values
        if value.encode() in path.read_bytes()
    ]


def test_a_warned_job_ends_its_units_and_goes_on_with_fewer_nodes(
    lab: Lab, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = lab.submit(run_dir, "slurm.lead_seconds=90")
    hold(lab, run_dir)
    lab.on("ctl", "scancel", "--batch", "--signal=USR1", job)
    until(lambda: "got SIGUSR1" in logs_of(run_dir), "the launcher heard")
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


def test_a_job_at_its_time_limit_ends_hung_units_and_starts_again_beside_one_that_lacks_a_node(
    lab: Lab, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """While the first waits for its limit, the second waits for a node that does not join."""
    run_dir, lonely = tmp_path / "run", tmp_path / "lonely"
    job = lab.submit(run_dir, "slurm.time='60'", "slurm.lead_seconds=20", **PATIENT)
    hold(lab, run_dir)
    # However slow the machine: the limit comes half a minute to one and a half from now.
    limit = (lab.seconds(job) + 30) // 60 + 1
    lab.on("ctl", "scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    lonely.mkdir()
    lab.on("n2", "mount", "-t", "tmpfs", "tmpfs", lonely)
    other = lab.submit(lonely, "slurm.join_seconds=40", "slurm.fruitless_starts=1")
    until(
        lambda: lab.signal_workers(signal.SIGSTOP) == 0 and lab.state(job).startswith("PENDING 1 "),
        "the job has requeued itself",
        pause=0.2,
        shown=lambda: lab.story(job),
    )
    assert "got SIGUSR1" in logs_of(run_dir)
    assert "ending them" in logs_of(run_dir)
    lab.on("ctl", "scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert_gave_up_for_want_of_n2(lab, other, lonely)
    assert lab.await_end(job) == "COMPLETED 1 0:0", logs_of(run_dir)
    assert bytes_of(run_dir) == undisturbed
    # On a busy machine the driver may be killed before it has said that it ends, or after.
    killed = "killing it" in logs_of(run_dir)
    assert stopped(run_dir) == [143] or (killed and not stopped(run_dir))


def assert_gave_up_for_want_of_n2(lab: Lab, job: str, run_dir: Path) -> None:
    assert lab.await_end(job) == "FAILED 0 75:0", logs_of(run_dir)
    said = logs_of(run_dir)
    assert "1 of 2 nodes missing after" in said
    assert "n2 did not report at all (not started, or the run folder is not shared with it)" in said
    assert "1 starts in a row finished no unit: not requeued" in said
    assert not (run_dir / "run.json").exists()


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


def test_a_job_whose_node_fails_is_queued_again_and_goes_on_when_there_is_one(
    lab: Lab, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = lab.submit(run_dir)
    hold(lab, run_dir)
    try:
        lab.on("ctl", "scontrol", "update", "nodename=n2", "state=down", "reason=lost")
        lab.await_state(job, "PENDING 1")
        done = shards(run_dir)
        assert not (run_dir / "output").exists()
    finally:
        # It may have come back by itself: its daemon lives.
        lab.on("ctl", "scontrol", "update", "nodename=n2", "state=resume", check=False)
    assert lab.await_end(job) == "COMPLETED 1 0:0", logs_of(run_dir)
    resumed = [e for e in read_events(run_dir / "events.jsonl") if e["event"] == "resuming"]
    assert any(e["stage"] == "calibrate" and e["done"] >= done for e in resumed)
    assert bytes_of(run_dir) == undisturbed


def test_a_cancelled_job_stays_cancelled(lab: Lab, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = lab.submit(run_dir)
    until(lambda: (run_dir / "slurm" / f"nodes-{job}.log").exists(), "started")
    lab.on("ctl", "scancel", job)
    assert lab.await_end(job).startswith("CANCELLED 0")
    until(lambda: not lab.on("ctl", "squeue", "--noheader"), "the job is gone", pause=0.3)
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
