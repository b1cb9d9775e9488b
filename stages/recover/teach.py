"""Asks the original what it says along the text, part by part.

`resident`: the worker holds the original. `streaming`: one of its layers at a time; the hidden
states of a part lie in files beside its output and every layer is read once per part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.streaming.model import StreamedModel, open_streamed
from stages.calibrate.config import Engine
from stages.calibrate.streaming import HiddenStates, scratch
from stages.corpus.blocks import Batch, Block, batches
from stages.corpus.stage import read_blocks
from stages.model import batch_of, load_model, pad_id
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
    parts = list(batches(blocks, config.teacher.batch_size))
    spoken = _streamed(model, parts, output) if engine == "streaming" else _resident(model, parts)
    rows: list[Teacher] = []
    for logits, mask in spoken:
        for said, real in zip(logits, mask, strict=True):
            predicting = said[:-1][real[1:] & real[:-1]]
            found = teacher_of(predicting, config.temperature, config.teacher.top)
            rows.append(replace(found, ids=found.ids.int()))
    write_taught(output, rows)


def _resident(model: Any, parts: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    for part in parts:
        ids, mask = batch_of(part.rows, pad_id(model), model.device)
        yield model(input_ids=ids, attention_mask=mask, use_cache=False).logits, mask


def _streamed(
    model: StreamedModel, parts: Sequence[Batch], output: Path
) -> Iterator[tuple[Tensor, Tensor]]:
    with scratch(output) as folder:
        files = [HiddenStates(folder / f"batch-{i:05d}") for i in range(len(parts))]
        for index in range(len(model.layers)):
            with model.layer(index) as layer:
                for part, file in zip(parts, files, strict=True):
                    ids, mask = batch_of(part.rows, pad_id(model), model.device)
                    call = model.calls(input_ids=ids, attention_mask=mask)[index]
                    hidden = file.read(call.hidden).to(model.device) if index else call.hidden
                    file.write(call.run(layer, hidden))
        for part, file in zip(parts, files, strict=True):
            ids, mask = batch_of(part.rows, pad_id(model), model.device)
            like = model.calls(input_ids=ids, attention_mask=mask)[-1].hidden
            hidden = file.read(like).to(model.device)
            yield model.logits(hidden, input_ids=ids, attention_mask=mask), mask
