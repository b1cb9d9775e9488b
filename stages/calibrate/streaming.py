"""Observes a shard layer by layer: each layer is read once and sees all batches of the shard.

Every (domain, layer) sum is added up in the order of the batches, as with the whole model in
memory, so that the sums are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from models.blocks import find_block
from models.streaming.model import StreamedModel
from stages.calibrate.observer import watching
from stages.calibrate.recorder import Recorder
from stages.corpus.blocks import Batch
from stages.passage import Passage, scratch


@torch.inference_mode()
def observe(
    model: StreamedModel, batches: Sequence[Batch], recorder: Recorder, output: Path
) -> None:
    """Hands every layer's passes to `recorder`; `output` is the shard that they will become.

    Raises:
        CheckpointError: a layer cannot be read. DiskFull: no room for the hidden states.
    """
    sparse = [i for i, layer in enumerate(model.layers) if find_block(layer) is not None]
    with scratch(output) as folder:
        passage = Passage(model, [batch.rows for batch in batches], folder)
        # Nothing is observed behind the last sparse layer.
        for index in range(max(sparse, default=-1) + 1):
            with model.layer(index) as layer:
                block = find_block(layer)
                watched = {} if block is None else {index: block}
                for number, batch in enumerate(batches):
                    with watching(watched, passage.mask(number)) as seen:
                        passage.advance(number, layer, index)
                    recorder.add(batch, seen)
