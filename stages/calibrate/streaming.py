"""Observes a shard layer by layer: each layer is read once and sees all batches of the shard.

Between layers the hidden states of the shard lie in memory-mapped files beside its output. Every
(domain, layer) sum is added up in the order of the batches, as with the whole model in memory, so
that the sums are the same to the last bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.atomic import reporting_full_disk
from models.streaming.model import StreamedModel
from stages.calibrate.observer import Sums, moe_block, watching
from stages.calibrate.statistics import Key, accumulate
from stages.corpus.blocks import Block
from stages.model import batch_of, pad_id

_SUFFIX = ".hidden.tmp"


@torch.inference_mode()
def observe(
    model: StreamedModel, batches: Sequence[Sequence[Block]], num_experts: int, output: Path
) -> dict[Key, Sums]:
    """(domain, layer) -> sums of the shard that will become `output`.

    Raises:
        CheckpointError: a layer cannot be read. DiskFull: no room for the hidden states.
    """
    sums: dict[Key, Sums] = {}
    sparse = [i for i, layer in enumerate(model.layers) if moe_block(layer) is not None]
    with _scratch(output) as folder:
        # Nothing is observed behind the last sparse layer.
        for index in range(max(sparse, default=-1) + 1):
            with model.layer(index) as layer:
                for number, batch in enumerate(batches):
                    file = HiddenStates(folder / f"batch-{number:05d}")
                    _advance(model, layer, index, batch, file, num_experts, sums)
    return sums


def _advance(
    model: StreamedModel,
    layer: nn.Module,
    index: int,
    batch: Sequence[Block],
    file: HiddenStates,
    num_experts: int,
    sums: dict[Key, Sums],
) -> None:
    """Takes the hidden states of one batch through one layer."""
    ids, mask = batch_of([block.tokens for block in batch], pad_id(model), model.device)
    call = model.calls(input_ids=ids, attention_mask=mask)[index]
    if index == 0:
        file.create(call.hidden)
    hidden = file.open(call.hidden)
    block = moe_block(layer)
    with watching({} if block is None else {index: block}, mask) as seen:
        hidden.copy_(call.run(layer, hidden.to(model.device)))
    accumulate(sums, batch[0].domain, seen, num_experts)


class HiddenStates:
    """The hidden states `[B, S, H]` of one batch in a file, in the type that the model runs in."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def create(self, hidden: Tensor) -> None:
        """Writes them in the ordinary way: a full disk is an error here, not a killed process."""
        raw = hidden.contiguous().view(torch.uint8).numpy(force=True)
        with reporting_full_disk(self._path), self._path.open("wb") as file:
            file.write(raw.data)

    def open(self, like: Tensor) -> Tensor:
        """`[B, S, H]` on the CPU, mapped: what is written to the tensor is written to the file."""
        mapped = torch.from_file(
            str(self._path), shared=True, size=like.numel(), dtype=like.dtype, device="cpu"
        )
        return mapped.view(like.shape)


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder beside the output that is gone afterwards."""
    # The process id: two attempts at one shard never share hidden states.
    folder = output.with_name(f".{output.name}.{os.getpid()}{_SUFFIX}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(output: Path) -> None:
    """Frees what attempts at this shard left that were killed."""
    for folder in output.parent.glob(f".{output.name}.*{_SUFFIX}"):
        shutil.rmtree(folder, ignore_errors=True)
