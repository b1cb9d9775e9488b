"""Bundled text as windows of tokens, and as a folder to train from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.uncurl.setup import BUNDLED, LENGTH, Setup

FILES = ("calibration", "validation", "test")


def data_folder(setup: Setup) -> Path:
    """The bundled data, or its beginning where the setup asks for less."""
    if setup.characters is None:
        return BUNDLED / "data"
    folder = setup.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        path = folder / f"{name}.parquet"
        if not path.exists():
            pq.write_table(_beginning(name, setup.characters), path)
    return folder


def windows(setup: Setup, name: str, domain: str, tokens: int | None) -> Tensor:
    """[W, LENGTH + 1] that overlap by the token to be predicted; None: all that the file gives."""
    table = pq.read_table(data_folder(setup) / f"{name}.parquet").to_pydict()
    tokenizer = _tokenizer()
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text, each in zip(table["text"], table["domain"], strict=True):
        if each == domain and (tokens is None or len(ids) <= tokens):
            ids += [*tokenizer(text, verbose=False)["input_ids"], end]
    size = len(ids) - 1 if tokens is None else min(tokens, len(ids) - 1)
    return torch.tensor(ids[: size + 1]).unfold(0, LENGTH + 1, LENGTH)


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED / "model")


def _beginning(name: str, characters: int) -> Any:
    """Whole documents of every domain until so many characters are reached."""
    table = pq.read_table(BUNDLED / "data" / f"{name}.parquet")
    left: dict[str, int] = {}
    kept = []
    rows = zip(table["domain"].to_pylist(), table["text"].to_pylist(), strict=True)
    for index, (domain, text) in enumerate(rows):
        if left.setdefault(domain, characters) > 0:
            left[domain] -= len(text)
            kept.append(index)
    return table.take(kept)
