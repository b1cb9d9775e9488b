"""Two processes never work on one run at the same time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from orchestrator.errors import RunFolderError
from orchestrator.lock import exclusive
from orchestrator.run_folder import RunFolder
from tests.orchestrator.tiny_run import Command, Inputs


@pytest.fixture
def busy(inputs: Inputs) -> Iterator[int]:
    """Another process that holds the lock of the run; its id."""
    inputs.run_dir.mkdir()
    code = (
        "import sys; from pathlib import Path; from orchestrator.lock import exclusive;"
        "from orchestrator.run_folder import RunFolder\n"
        "with exclusive(RunFolder(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(inputs.run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process.pid
    process.kill()
    process.communicate()


def test_a_run_that_another_process_works_on_is_refused_and_names_it(
    coalesce: Command, inputs: Inputs, busy: int
) -> None:
    outcome = coalesce("run", inputs.recipe(), "--quiet")
    assert outcome.code == 2
    assert f"process {busy} on" in outcome.err
    assert not (inputs.run_dir / "calibration").exists()


def test_a_killed_process_lets_go(inputs: Inputs, busy: int) -> None:
    subprocess.run(["kill", "-9", str(busy)], check=True)
    for _ in range(200):
        try:
            with exclusive(RunFolder(inputs.run_dir)):
                return
        except RunFolderError:
            time.sleep(0.05)
    pytest.fail("the lock outlived its process")
