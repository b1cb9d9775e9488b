"""A training that is paused, killed or run by ranks ends where an undisturbed one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.events import read_events
from orchestrator.load import load
from orchestrator.preflight import prepare
from orchestrator.run import run
from orchestrator.run_folder import RunFolder
from orchestrator.status import headline
from stages.recover.progress import read_course
from tests.orchestrator.tiny_run import Inputs

pytestmark = pytest.mark.slow
STEPS = 120
RECOVER: dict[str, Any] = {
    "mode": "full",
    "steps": STEPS,
    "batch": 4,
    "warmup": 1,
    "learning_rate": 0.002,
    "checkpoint_every": 10,
    "teacher": {"top": 8, "shards": 2, "dtype": "float32"},
}


def recipe(inputs: Inputs, name: str, **section: Any) -> Path:
    executor = section.pop("executor", {"kind": "local"})
    made = inputs.recipe(
        run_dir=str(inputs.root / name), recover=RECOVER | section, executor=executor
    )
    return made.rename(inputs.root / f"{name}.yaml")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "output").glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def start(made: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "orchestrator", "run", str(made), "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, env=environment, text=True, **pipes)


def await_step(process: subprocess.Popen[str], folder: RunFolder, step: int) -> None:
    """Until the training has made so many steps."""
    deadline = time.monotonic() + 300
    while len(read_course(folder.recover / "course.jsonl")) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_paused_then_killed_it_ends_in_the_bytes_of_an_undisturbed_run(inputs: Inputs) -> None:
    run(prepare(load(str(recipe(inputs, "whole"))).config))
    made, folder = recipe(inputs, "disturbed"), RunFolder(inputs.root / "disturbed")
    paused = start(made)
    await_step(paused, folder, 3)
    paused.send_signal(signal.SIGUSR1)
    assert paused.wait(timeout=120) == 75, paused.communicate()[0]
    assert "stopped by SIGUSR1" in headline(folder)
    at = len(read_course(folder.recover / "course.jsonl"))
    assert 3 <= at < STEPS
    assert (folder.recover / f"state-{at:08d}.safetensors").exists()
    killed = start(made)
    await_step(killed, folder, min(at + 15, STEPS - 1))
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    assert not (folder.root / "output").exists()
    assert list(folder.recover.glob("state-*.safetensors"))
    ended = start(made)
    assert ended.wait(timeout=300) == 0, ended.communicate()[0]
    found, expected = tensors(folder.root), tensors(inputs.root / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps = [line["step"] for line in read_course(folder.recover / "course.jsonl")]
    assert steps == list(range(1, STEPS + 1))
    events = list(read_events(folder.events))
    assert not [event for event in events if event["event"] == "unit_failed"]


def test_ranks_on_ray_train_what_one_process_trains(inputs: Inputs) -> None:
    few = {"steps": 8, "checkpoint_every": 4}
    run(prepare(load(str(recipe(inputs, "alone", **few))).config))
    two = {"ranks": 2, "deepspeed": {"zero_stage": 2}, "executor": {"kind": "ray", "workers": 2}}
    run(prepare(load(str(recipe(inputs, "two", **few, **two))).config))
    found, expected = tensors(inputs.root / "two"), tensors(inputs.root / "alone")
    for name, tensor in expected.items():
        assert torch.allclose(found[name].float(), tensor.float(), atol=2e-5, rtol=1e-4), name
