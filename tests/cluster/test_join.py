"""A run may join a Ray cluster that somebody else started, and leaves it running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    """A driver of its own can connect and run a task."""
    code = (
        f"import ray; ray.init({address!r}, log_to_driver=False);"
        "assert ray.get(ray.remote(lambda: 7).remote()) == 7"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, check=False, timeout=120)
    return done.returncode == 0


@pytest.fixture
def cluster() -> Iterator[str]:
    """`ray start --head` in a session of its own; `ray stop` would end other people's clusters."""
    address = f"127.0.0.1:{free_port()}"
    words = [str(Path(sys.prefix) / "bin" / "ray"), "start", "--head", "--block", "--num-cpus=2"]
    words += ["--node-ip-address=127.0.0.1", f"--port={address.split(':')[1]}"]
    words += ["--include-dashboard=false", "--object-store-memory=100000000"]
    head = subprocess.Popen(
        words,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not answers(address):
        assert time.monotonic() < deadline, "the cluster did not come up"
    yield address
    os.killpg(head.pid, signal.SIGTERM)
    head.wait(timeout=60)


def test_a_run_joins_by_address_and_leaves_the_cluster_running(
    cluster: str, tmp_path: Path
) -> None:
    words = ["run", "quickstart", "--quiet", f"run_dir={tmp_path / 'run'}", "evaluate=null"]
    words += ["calibrate.data.tokens=10240", f"executor.address={cluster}", "executor.kind=ray"]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *words],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "output" / "config.json").exists()
    assert answers(cluster)
