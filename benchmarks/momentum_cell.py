"""One model of the momentum benchmark: trained, then looked at on held-out text.

A cell that has its JSON file is not trained again, and one that was interrupted goes on from its
last saved step. Training is that of `examples/pretrain`, in this process.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.attack import attacked, nats, words
from benchmarks.momentum_text import REPOSITORY, VOCABULARY, held_out

PRETRAIN = REPOSITORY / "examples" / "pretrain"
RATES = (0.0, 0.025, 0.05, 0.1)
VARIANTS: dict[str, dict[str, Any]] = {
    "smoe": {"mu": 0.0},
    "momentum": {"mu": 0.7},
    "adam": {"momentum_kind": "adam"},
    "robust": {"momentum_kind": "robust"},
}
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "vocab_size": VOCABULARY,
}
_SAVE_EVERY = 100


@dataclass(frozen=True)
class Size:
    """How long a model is trained, and on how much text it is looked at."""

    steps: int
    windows: int  # per step
    length: int  # tokens of a window, in training and measuring
    characters: int  # of every held-out split
    splits: tuple[str, ...] = ("validation", "test")


@dataclass(frozen=True)
class Cell:
    """One training."""

    style: str
    layers: int
    seed: int
    variant: str
    learning_rate: float

    @property
    def name(self) -> str:
        """`post_ln-6-0-momentum-0.003`."""
        return f"{self.style}-{self.layers}-{self.seed}-{self.variant}-{self.learning_rate:g}"


@dataclass(frozen=True)
class Place:
    """Where a benchmark keeps its models."""

    out: Path

    @property
    def tokenizer(self) -> Path:
        """Of all models."""
        return self.out / "tokenizer"

    def folder(self, cell: Cell) -> Path:
        """Of one training."""
        return self.out / "cells" / cell.name

    def model(self, cell: Cell) -> Path:
        """The trained model, in transformers' format."""
        return self.folder(cell) / "model"


def result_file(cell: Cell, place: Place) -> Path:
    """What a finished cell has."""
    return place.folder(cell) / "result.json"


def run(cell: Cell, size: Size, place: Place) -> dict[str, Any]:
    """The figures of a cell; it is trained if it was not."""
    result = result_file(cell, place)
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    began = time.process_time()
    losses = train(cell, size, place)
    found = asdict(cell) | {"training": _curve(losses)}
    found |= look(place.model(cell), place.tokenizer, size)
    found["cpu_seconds"] = round(time.process_time() - began, 1)
    result.write_text(json.dumps(found))
    return found


def train(cell: Cell, size: Size, place: Place) -> list[float]:
    """Cross-entropy of every step, nats per token."""
    if str(PRETRAIN) not in sys.path:
        sys.path.insert(0, str(PRETRAIN))
    from corpus import read_documents
    from model import make_momentum_config
    from tokens import encode_stream
    from train import Files, Recipe
    from train import train as pretrain

    from benchmarks.momentum_text import BUNDLED, DOMAIN

    recipe = Recipe(
        steps=size.steps,
        per_domain=size.windows,
        sequence_length=size.length,
        learning_rate=cell.learning_rate,
        warmup=max(1, size.steps // 10),
        decay=0.35,
        weight_decay=0.1,
        balance=0.01,
        seed=cell.seed,
    )
    fields = MODEL | VARIANTS[cell.variant]
    config = make_momentum_config(block_style=cell.style, num_hidden_layers=cell.layers, **fields)
    place.folder(cell).mkdir(parents=True, exist_ok=True)
    state = place.folder(cell) / "state.pt"
    files = Files(place.model(cell), place.tokenizer, state, _SAVE_EVERY)
    everything = read_documents(BUNDLED / "data" / "calibration.parquet")
    some = [document for document in everything if document.domain == DOMAIN]
    progress = pretrain({DOMAIN: encode_stream(place.tokenizer, some)}, recipe, files, config)
    return list(progress.losses)


def look(model_folder: Path, tokenizer_folder: Path, size: Size) -> dict[str, Any]:
    """Nats per word and per token by split and rate of attack; what the layers do on clean text."""
    from transformers import AutoTokenizer

    from benchmarks.momentum_layers import layer_figures
    from stages.model import load_model

    model = load_model(model_folder, "float32")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    measured: dict[str, dict[str, Any]] = {}
    for split in size.splits:
        texts = held_out(split, size.characters)
        measured[split] = {}
        for rate in RATES:
            changed = [attacked(text, rate, place) for place, text in enumerate(texts)]
            found = nats(model, tokenizer, changed, size.length)
            measured[split][f"{100 * rate:g}"] = _figures(found, words(texts))
    clean = held_out(size.splits[0], size.characters)
    return {"text": measured, "layers_seen": layer_figures(model, tokenizer, clean, size.length)}


def _figures(found: tuple[float, int], count: int) -> dict[str, float]:
    total, tokens = found
    return {
        "nats_per_word": total / count,
        "nats_per_token": total / tokens,
        "perplexity_per_word": math.exp(total / count),
        "perplexity_per_token": math.exp(total / tokens),
        "words": count,
        "tokens": tokens,
    }


def _curve(losses: Sequence[float], points: int = 20) -> list[float]:
    """Means of equal stretches."""
    step = max(1, len(losses) // points)
    return [_mean(losses[i : i + step]) for i in range(0, len(losses) - step + 1, step)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
