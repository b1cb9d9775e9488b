"""Asks the original what it says along the text, part by part.

`resident`: the worker holds the original. `streaming`: one of its layers at a time; the hidden
states of a part lie in files beside its output and every layer is read once per part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.streaming.model import open_streamed
from stages.calibrate.config import Engine
from stages.corpus.blocks import Block, batches
from stages.corpus.stage import read_blocks
from stages.forward import resident, streamed
from stages.model import load_model
from stages.recover.config import RecoverConfig
from stages.recover.loss import Teacher, teacher_of
from stages.recover.taught import write_taught


def teach(model: Path, corpus: Path, output: Path, config: RecoverConfig) -> tuple[Path, ...]:
    """The whole text in one file, by the whole model in memory; for programs and experiments.

    Returns:
        the file, as `recover` takes it.
    """
    blocks = read_blocks(corpus)
    original = load_model(model, config.teacher.dtype)
    say(original, blocks, output, config, "resident")
    return (output,)


def open_original(folder: Path, dtype: str, engine: Engine) -> Any:
    """The original, whole or layer by layer."""
    return open_streamed(folder, dtype) if engine == "streaming" else load_model(folder, dtype)


@torch.inference_mode()
def say(
    model: Any, blocks: Sequence[Block], output: Path, config: RecoverConfig, engine: Engine
) -> None:
    """Writes what the original says along some blocks.

    Raises:
        DiskFull: no room for the file, or for hidden states.
    """
    parts = [part.rows for part in batches(blocks, config.teacher.batch_size)]
    whole = engine == "resident"
    spoken = resident(model, parts) if whole else streamed(model, parts, output)
    rows: list[Teacher] = []
    for logits, _, mask in spoken:
        for said, real in zip(logits, mask, strict=True):
            predicting = said[:-1][real[1:] & real[:-1]]
            found = teacher_of(predicting, config.temperature, config.teacher.top)
            rows.append(replace(found, ids=found.ids.int()))
    write_taught(output, rows)
