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
from stages.model import batch_of, pad_id, start_id
from stages.passage import Passage, Rows, scratch

Logits = tuple[Tensor, Tensor, Tensor]  # [B, S, V]; [B, S] ids; [B, S] bool, False at padding


def run(model: Any, rows: Rows) -> Logits:
    """One batch through a model, or one that DeepSpeed wraps. Logits are about the next token.

    An encoder-decoder reads the first half of every row (as in calibration) and is asked to
    continue it: ids and mask are what its decoder is given, a start token and the second half.
    """
    inner = getattr(model, "module", model)
    pad, device = pad_id(inner), inner.device
    ids, mask = batch_of(rows, pad, device)
    if not inner.config.is_encoder_decoder:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids, mask
    read = [row[: _half(row)] for row in rows]
    written = [(start_id(inner), *row[_half(row) :]) for row in rows]
    (ids, mask), (behind, follows) = (batch_of(part, pad, device) for part in (read, written))
    found = model(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=behind,
        decoder_attention_mask=follows,
        use_cache=False,
    )
    return found.logits, behind, follows


def predicted(config: Any, rows: Rows) -> int:
    """Tokens of these rows that are predicted by a model of this config."""
    if config.is_encoder_decoder:
        return sum(len(row) - _half(row) for row in rows)
    return sum(len(row) - 1 for row in rows)


def _half(row: Sequence[int]) -> int:
    """Tokens that an encoder reads: one more than its decoder continues with where odd."""
    return (len(row) + 1) // 2


@torch.inference_mode()
def resident(model: Any, batches: Sequence[Rows]) -> Iterator[Logits]:
    """Batch by batch."""
    for rows in batches:
        yield run(model, rows)


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
