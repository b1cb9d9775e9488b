"""The logits of every batch, with the whole model in memory or one decoder layer at a time.

Both run the same operations on the same batches and give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.streaming.model import StreamedModel
from stages.model import batch_of, pad_id
from stages.passage import Passage, Rows, scratch

Logits = tuple[Tensor, Tensor, Tensor]  # [B, S, V]; [B, S] ids; [B, S] bool, False at padding


@torch.inference_mode()
def resident(model: Any, batches: Sequence[Rows]) -> Iterator[Logits]:
    """Batch by batch."""
    for rows in batches:
        ids, mask = batch_of(rows, pad_id(model), model.device)
        yield model(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids, mask


@torch.inference_mode()
def streamed(model: StreamedModel, batches: Sequence[Rows], output: Path) -> Iterator[Logits]:
    """All batches through each layer, then batch by batch through the head.

    Args:
        output: hidden states lie beside it while this runs.

    Raises:
        CheckpointError: a layer cannot be read. DiskFull: no room for the hidden states.
    """
    with scratch(output) as folder:
        passage = Passage(model, batches, folder)
        for index in range(len(model.layers)):
            with model.layer(index) as layer:
                for number in range(len(batches)):
                    passage.advance(number, layer, index)
        for number in range(len(batches)):
            given = passage.inputs(number)
            logits = model.logits(passage.hidden(number), **given)
            yield logits, given["input_ids"], given["attention_mask"]
