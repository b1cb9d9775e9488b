"""Training on two ranks is training on one: the same batches, the same losses but for rounding."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.examples.test_variants import EXAMPLES, command

# Nats per token; 0.0002 was measured. In bfloat16 products of other shapes round otherwise, and a
# token whose experts are nearly tied may go to another one.
TOLERANCE = 0.003
STEPS = 24


def words(folder: Path, ranks: int) -> list[str]:
    """The command for heavy ball alone, ten windows per step, at a rate at which it soon learns."""
    made = command(folder, STEPS, per_domain=2, momentum={"mu": 0.7})
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["recipe"]["learning_rate"] = 0.01
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return [*made, "--ranks", str(ranks)]


def losses(folder: Path) -> torch.Tensor:
    """Of every step."""
    found: dict[str, Any] = json.loads((folder / "losses.json").read_text())
    return torch.tensor(found["momentum"]["losses"])


def run(folder: Path, ranks: int) -> torch.Tensor:
    """Losses of a whole training."""
    done = subprocess.run(
        words(folder, ranks), cwd=EXAMPLES / "pretrain", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one_and_go_on_from_its_state(tmp_path: Path) -> None:
    whole = run(tmp_path / "one", 1)
    shared = run(tmp_path / "two", 2)
    state = tmp_path / "half" / "momentum" / "state.pt"
    with subprocess.Popen(words(tmp_path / "half", 1), cwd=EXAMPLES / "pretrain") as process:
        while not state.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    begun = torch.load(state, weights_only=True)["progress"]["step"]
    continued = run(tmp_path / "half", 2)

    assert 0 < begun < STEPS == len(whole) == len(shared) == len(continued)
    assert whole[-1] < whole[0] - 0.1
    torch.testing.assert_close(shared, whole, atol=TOLERANCE, rtol=0)
    assert continued[:begun].equal(whole[:begun])
    torch.testing.assert_close(continued, whole, atol=TOLERANCE, rtol=0)
    assert (tmp_path / "two" / "losses.png").stat().st_size > 10_000


def test_windows_that_cannot_be_dealt_out_evenly_are_refused() -> None:
    """Five windows per step on two ranks; asked before a model is made."""
    code = (
        "import parallel, train; from pathlib import Path;"
        "recipe = train.Recipe(1, 1, 16, 1e-3, 1, 0.3, 0.1, 0.0, 0);"
        "parallel.train(dict.fromkeys('abcde'), recipe, None, None, 0, 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES / "pretrain", capture_output=True, text=True
    )
    assert "5 windows per step cannot be dealt out to 2 ranks" in done.stderr
