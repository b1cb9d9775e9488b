"""The recipe trains SMoE and MomentumSMoE variants on the same batches, and can be interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from models.momentum.registration import register

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
}


def command(folder: Path, steps: int, per_domain: int = 1, **variants: dict[str, Any]) -> list[str]:
    """Writes the config of a tiny comparison; the words that run it."""
    found = yaml.safe_load((EXAMPLES / "pretrain" / "variants.yaml").read_text())
    small = {"per_domain": per_domain, "sequence_length": 16, "warmup": 2}
    config = found | {"recipe": found["recipe"] | small, "model": found["model"] | TINY}
    if variants:
        config["variants"] = variants
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    words = {
        "config": folder / "config.yaml",
        "data": EXAMPLES / "bundled" / "data",
        "tokenizer": EXAMPLES / "bundled" / "model",
        "out": folder,
        "steps": steps,
        "save-every": 2,
        "threads": 1,
        "held-out-tokens": 200,
    }
    given = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "variants.py", *given]


def compare(folder: Path, steps: int, **variants: dict[str, Any]) -> dict[str, Any]:
    """`losses.json` of a tiny comparison."""
    words = command(folder, steps, **variants)
    done = subprocess.run(words, cwd=EXAMPLES / "pretrain", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses: dict[str, Any] = json.loads((folder / "losses.json").read_text())
    return losses


@pytest.mark.slow
def test_variants_see_the_same_batches_and_save_models_that_open(tmp_path: Path) -> None:
    found = compare(tmp_path, 3)

    assert list(found) == ["smoe", "momentum", "adam", "robust"]
    firsts = [found[name]["losses"][0] for name in found]
    assert max(firsts) - min(firsts) < 0.5 and len(set(firsts)) == 4
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    register()
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adam" / "model")
    assert opened.config.momentum_kind == "adam" and opened.config.block_style == "post_ln"


@pytest.mark.fault
@pytest.mark.slow
def test_training_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = compare(tmp_path / "whole", 60, momentum={"mu": 0.7})
    words = command(tmp_path / "killed", 60, momentum={"mu": 0.7})
    state = tmp_path / "killed" / "momentum" / "state.pt"
    with subprocess.Popen(words, cwd=EXAMPLES / "pretrain") as process:
        while not state.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert 0 < torch.load(state, weights_only=True)["progress"]["step"] < 60

    again = compare(tmp_path / "killed", 60, momentum={"mu": 0.7})

    assert again["momentum"]["losses"] == whole["momentum"]["losses"]
    assert len(again["momentum"]["losses"]) == 60
