"""One batch through a model that is wholly in memory, every layer observed as it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from models.blocks import encoder_depth, find_blocks
from stages.calibrate.observer import Routed, watching
from stages.calibrate.recorder import Recorder
from stages.corpus.blocks import Batch
from stages.model import batch_of, pad_id, start_id

Rows = list[Sequence[int]]


@torch.inference_mode()
def observe_batch(model: Any, batch: Batch, recorder: Recorder) -> None:
    """One forward pass; hands what every layer did to `recorder`, layer by layer."""

    def hand_over(layer: int, seen: Routed) -> None:
        recorder.add(batch, {layer: seen})

    blocks, pad, device = find_blocks(model), pad_id(model), model.device
    if not model.config.is_encoder_decoder:
        ids, mask = batch_of(batch.rows, pad, device)
        with watching(blocks, mask, hand_over):
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return
    read, written = halves(batch.rows, start_id(model))
    ids, mask = batch_of(read, pad, device)
    started, follows = batch_of(written, pad, device)
    behind = encoder_depth(model)
    with ExitStack() as stack:
        encoder = {layer: block for layer, block in blocks.items() if layer < behind}
        decoder = {layer: block for layer, block in blocks.items() if layer >= behind}
        stack.enter_context(watching(encoder, mask, hand_over))
        stack.enter_context(watching(decoder, follows, hand_over))
        model.base_model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=started,
            decoder_attention_mask=follows,
            use_cache=False,
        )


def halves(rows: Sequence[Sequence[int]], start: int) -> tuple[Rows, Rows]:
    """What an encoder reads and what its decoder is given of each block.

    The encoder reads the first half (the longer one of an odd number). The decoder is taught to
    continue: it is given `start` and the second half without its last token, so it makes one step
    per token of the second half. A block of one token is read and continued by nothing but `start`.
    """
    read: Rows = [row[: (len(row) + 1) // 2] for row in rows]
    written: Rows = [(start, *row[len(first) : -1]) for row, first in zip(rows, read, strict=True)]
    return read, written
