"""`coalesce submit ray` against a real Ray cluster with a job server that the test starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest

from cluster.slurm.allocation import free_port
from orchestrator.progress import STAGES
from tests.orchestrator.tiny_run import Command, Inputs, snapshot, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.fault]
REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A cluster in a session of its own, with ports of its own; `ray stop` would end others'."""
    ports = {
        name: free_port("127.0.0.1")
        for name in ("port", "dashboard-port", "ray-client-server-port")
    }
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        words += [f"--{name}={port}" for name, port in ports.items()]
        words += ["--node-ip-address=127.0.0.1", "--num-cpus=2", f"--temp-dir={folder}"]
        words += ["--dashboard-agent-listen-port=0", "--object-store-memory=100000000"]
        words += ["--min-worker-port=0", "--max-worker-port=0"]
        head = subprocess.Popen(
            words,
            # The cluster has no coalesce of its own: jobs bring it.
            env=ENVIRONMENT | {"PYTHONPATH": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        try:
            await_server(address)
            yield address
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            head.wait(timeout=60)


def await_server(address: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5):
                return
        except (URLError, OSError):
            assert time.monotonic() < deadline, "no job server"
            time.sleep(0.5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("tiny"))


def submit(server: str, *words: object) -> subprocess.Popen[str]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "orchestrator", "submit", "ray", *map(str, words)]
    return subprocess.Popen(
        [*command, "--address", server, "--upload-code", "--python", sys.executable],
        env=ENVIRONMENT,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def info(server: str, job: str) -> dict[str, object]:
    with urllib.request.urlopen(f"{server}/api/jobs/{job}", timeout=30) as answer:
        found: dict[str, object] = json.load(answer)
        return found


def test_a_run_on_somebody_elses_cluster_shows_its_log_and_ends_with_0(
    server: str, tiny: Inputs, tmp_path: Path
) -> None:
    run_dir = tmp_path / "it's a run"
    process = submit(server, tiny.recipe(), f"run_dir={run_dir}")
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    assert re.match(rf"submitted: job raysubmit_\w+ to {server}\n", out)
    assert out.count(f"[{len(STAGES)}/{len(STAGES)}] report: done") == 1
    assert f"checkpoint: {run_dir / 'output'}" in out
    assert re.search(r"job raysubmit_\w+: succeeded, exit code 0", err)
    assert (run_dir / "output" / "config.json").exists()
    await_server(server)


def test_a_failed_run_has_its_own_exit_code(server: str, tiny: Inputs, tmp_path: Path) -> None:
    process = submit(server, tiny.recipe(), f"run_dir={tmp_path / 'run'}", "model.path=/no/model")
    out, err = process.communicate(timeout=250)
    assert process.returncode == 2, out + err
    assert "error: no checkpoint folder at /no/model" in out
    assert "failed, exit code 2" in err


def test_without_waiting_the_command_ends_once_the_job_is_accepted(
    server: str, tiny: Inputs, tmp_path: Path
) -> None:
    words = (tiny.recipe(), f"run_dir={tmp_path / 'run'}", "model.path=/no/model", "--no-wait")
    process = submit(server, *words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    job = re.match(r"submitted: job (\w+)", out)
    assert job and f"ray job stop --address {server} {job[1]}" in out


def test_a_stopped_job_is_no_success_and_one_no_longer_followed_goes_on(
    server: str, tiny: Inputs, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = (tiny.recipe(calibrate__shards=32), f"run_dir={run_dir}")
    process = submit(server, *words)
    assert process.stdout is not None
    found = re.match(r"submitted: job (\w+)", process.stdout.readline())
    assert found
    deadline = time.monotonic() + 200
    while not (run_dir / "run.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    stop = urllib.request.Request(f"{server}/api/jobs/{found[1]}/stop", method="POST")
    urllib.request.urlopen(stop, timeout=60).close()
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "stopped, exit code" in err
    again = submit(server, *words)
    assert again.stdout is not None
    job = re.match(r"submitted: job (\w+)", again.stdout.readline())
    assert job
    again.send_signal(signal.SIGINT)
    out, err = again.communicate(timeout=100)
    assert again.returncode == 130, err
    assert f"no longer followed: job {job[1]} goes on" in out
    while (state := info(server, job[1])["status"]) in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline + 200
        time.sleep(0.5)
    assert state == "SUCCEEDED"


def test_a_dry_run_shows_the_job_without_values_of_variables(
    coalesce: Command, inputs: Inputs
) -> None:
    environment = inputs.root / "env.yaml"
    environment.write_text("env_vars: {HF_TOKEN: hf_planted123}\npip: [einops]\n")
    before = snapshot(inputs.root)
    recipe = inputs.recipe()
    outcome = coalesce("submit", "ray", recipe, "--dry-run", "--runtime-env", environment)
    assert outcome.code == 0, outcome.err
    shown = json.loads(outcome.out)
    assert shown["entrypoint"] == (
        "python -m orchestrator run config.yaml executor.kind=ray executor.address=auto"
    )
    assert shown["runtime_env"]["env_vars"] == {"HF_TOKEN": "***"}
    assert shown["config.yaml"]["run_dir"] == str(inputs.run_dir)
    assert "hf_planted123" not in outcome.out
    assert set(snapshot(inputs.root)) == set(before) | {"recipe.yaml"}


def test_an_address_where_nothing_answers_is_refused(coalesce: Command, inputs: Inputs) -> None:
    address = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    outcome = coalesce("submit", "ray", inputs.recipe(), "--address", address)
    assert outcome.code == 2
    assert f"no Ray job server at {address}" in outcome.err
    assert "--address http://HOST:8265" in outcome.err
