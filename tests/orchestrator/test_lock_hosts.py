"""Two hosts and one run folder: processes that have host names of their own (UTS namespaces)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.events import read_events
from tests.orchestrator.tiny_run import Inputs

pytestmark = pytest.mark.slow
HOLD = """
import sys
from pathlib import Path
from orchestrator.lock import exclusive
from orchestrator.run_folder import RunFolder
with exclusive(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def on_host(name: str, *words: str) -> subprocess.Popen[str]:
    """Python on a host of that name, which shares all files with this one."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("only root can give a process a host name of its own")
    shell = 'hostname "$0" && exec "$@"'
    return subprocess.Popen(
        ["unshare", "--uts", "sh", "-c", shell, name, sys.executable, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def holding(run_dir: Path) -> subprocess.Popen[str]:
    run_dir.mkdir(exist_ok=True)
    process = on_host("first-node", "-c", HOLD, str(run_dir))
    assert process.stdout is not None
    if process.stdout.readline() != "held\n":
        assert process.stderr is not None
        pytest.skip(f"no host name of its own here: {process.stderr.read()}")
    return process


def run(inputs: Inputs, recipe: Path) -> Any:
    process = on_host("second-node", "-m", "orchestrator", "run", str(recipe), "--quiet")
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def test_the_second_host_is_told_which_one_works_and_what_to_do_should_that_be_down(
    inputs: Inputs,
) -> None:
    recipe, first = inputs.recipe(model__verify="headers"), holding(inputs.run_dir)
    code, _, err = run(inputs, recipe)
    assert code == 2
    assert f"process {first.pid} on first-node" in err
    assert "if first-node is down, its lock ends when" in err
    assert f"rm {inputs.run_dir / 'run.lock'}" in err
    # What it says: the lock stays (as after a lost node on some file servers), and is removed.
    os.kill(first.pid, signal.SIGSTOP)
    (inputs.run_dir / "run.lock").unlink()
    code, _, err = run(inputs, recipe)
    assert code == 0, err
    first.kill()
    first.communicate()


def test_a_run_that_another_host_did_not_end_is_taken_over_and_says_so(inputs: Inputs) -> None:
    recipe, first = inputs.recipe(model__verify="headers"), holding(inputs.run_dir)
    first.kill()
    first.communicate()
    code, _, err = run(inputs, recipe)
    assert code == 0, err
    events = list(read_events(inputs.run_dir / "events.jsonl"))
    holders = [event["holder"] for event in events if event["event"] == "taken_over"]
    assert holders == [f"process {first.pid} on first-node"]
    assert (inputs.run_dir / "run.lock").read_text() == ""
