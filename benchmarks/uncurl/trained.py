"""Models of several sizes by `examples/pretrain/sizes.py`: one seed, the same batches for all."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.uncurl.setup import BUNDLED, PRETRAIN, Setup
from benchmarks.uncurl.text import data_folder


def model_folder(setup: Setup, seed: int, experts: int) -> Path:
    """Where a trained model lies."""
    return result_of(setup, seed, experts).parent / "model"


def result_of(setup: Setup, seed: int, experts: int) -> Path:
    """The file that is written when a model is trained."""
    return setup.out / f"seed{seed}" / "models" / f"e{experts}" / "result.json"


def train(setup: Setup, seed: int) -> None:
    """Trains what is missing."""
    if all(result_of(setup, seed, size).exists() for size in setup.sizes):
        return
    folder = setup.out / f"seed{seed}" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(setup.training(), sort_keys=False))
    words = {
        "config": folder / "config.yaml",
        "data": data_folder(setup),
        "tokenizer": BUNDLED / "model",
        "out": folder,
        "seed": seed,
        "threads": setup.threads,
    }
    if setup.characters is not None:
        words["held-out-tokens"] = 500
    given = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    subprocess.run(
        [sys.executable, "sizes.py", *given], cwd=PRETRAIN, check=True, stdout=sys.stderr
    )


def held_out(setup: Setup) -> list[dict[str, Any]]:
    """Held-out losses per domain of the models that are there, as they were trained."""
    made = []
    for seed, size in product(setup.seeds, setup.sizes):
        path = result_of(setup, seed, size)
        if path.exists():
            found = json.loads(path.read_text())
            losses = {name: round(loss, 4) for name, loss in found["held_out_loss"].items()}
            made.append({"seed": seed, "experts": size, "held_out_loss": losses})
    return made
