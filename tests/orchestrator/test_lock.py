"""Two processes never work on one run at the same time."""

from __future__ import annotations

import socket
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


def test_of_many_that_start_at_once_one_gets_in_and_all_others_name_it(inputs: Inputs) -> None:
    """Also where the file still holds the name of a process that was killed."""
    inputs.run_dir.mkdir()
    (inputs.run_dir / "run.lock").write_text(f"process 4194399 on {socket.gethostname()}\n")
    code = (
        "import sys; from pathlib import Path; from orchestrator.errors import RunFolderError\n"
        "from orchestrator.lock import exclusive; from orchestrator.run_folder import RunFolder\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try:\n"
        "    with exclusive(RunFolder(Path(sys.argv[1]))):\n"
        "        print('in', flush=True); sys.stdin.read()\n"
        "except RunFolderError as error: print(error.cause, flush=True)"
    )
    words = [sys.executable, "-c", code, str(inputs.run_dir)]
    pipe = subprocess.PIPE
    all_ = [subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) for _ in range(6)]
    for process in all_:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in all_:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = {process.pid: process.stdout.readline() for process in all_ if process.stdout}
    for process in all_:
        process.communicate()
    inside = [pid for pid, line in said.items() if line == "in\n"]
    assert len(inside) == 1
    others = [line for pid, line in said.items() if pid not in inside]
    assert all(f": process {inside[0]} on {socket.gethostname()}\n" in line for line in others)
