"""A run whose training is paused and killed ends where an undisturbed one ends."""

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
from orchestrator.run_folder import RunFolder
from orchestrator.status import headline
from stages.recover.api import recover
from stages.recover.progress import read_course
from tests.orchestrator.tiny_run import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Seconds of them are left when the wish to stop arrives.
STEPS = 600
RECOVER: dict[str, Any] = {
    "mode": "full",
    "steps": STEPS,
    "batch": 4,
    "warmup": 1,
    "learning_rate": 0.002,
    "checkpoint_every": 20,
    "alpha": 0,
}


def recipe(inputs: Inputs) -> Path:
    return inputs.recipe(recover=RECOVER, calibrate__sample=None, model__verify="headers")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "output").glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def start(made: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "orchestrator", "run", str(made), "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log_of(made).open("w") as log:
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log)


def log_of(made: Path) -> Path:
    return made.with_suffix(".log")


def await_step(process: subprocess.Popen[bytes], made: Path, folder: RunFolder, step: int) -> None:
    """Until the training has made so many steps."""
    deadline = time.monotonic() + 300
    while len(read_course(folder.recover / "course.jsonl")) < step:
        assert process.poll() is None, log_of(made).read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_paused_then_killed_it_ends_in_the_bytes_of_an_undisturbed_training(
    inputs: Inputs,
) -> None:
    made, folder = recipe(inputs), RunFolder(inputs.run_dir)
    paused = start(made)
    await_step(paused, made, folder, 3)
    paused.send_signal(signal.SIGUSR1)
    assert paused.wait(timeout=200) == 75, log_of(made).read_text()
    assert "stopped by SIGUSR1" in headline(folder)
    at = len(read_course(folder.recover / "course.jsonl"))
    assert 3 <= at < STEPS - 15
    assert (folder.recover / f"state-{at:08d}.safetensors").exists()
    killed = start(made)
    await_step(killed, made, folder, at + 15)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    assert not (folder.root / "output").exists()
    assert list(folder.recover.glob("state-*.safetensors"))
    ended = start(made)
    assert ended.wait(timeout=300) == 0, log_of(made).read_text()
    undisturbed = inputs.root / "undisturbed" / "output"
    config = load(str(made)).config.recover
    assert config is not None
    recover(folder.unrecovered, undisturbed, config, folder.recover_tokens)
    found, expected = tensors(folder.root), tensors(undisturbed.parent)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    steps = [line["step"] for line in read_course(folder.recover / "course.jsonl")]
    assert steps == list(range(1, STEPS + 1))
    events = list(read_events(folder.events))
    assert not [event for event in events if event["event"] == "unit_failed"]
    assert [event for event in events if event["event"] == "training"]
