"""Observes a shard layer by layer: each layer is read once and sees all batches of the shard.

Between layers the hidden states of the shard lie in memory-mapped files beside its output. Every
(domain, layer) sum is added up in the order of the batches, as with the whole model in memory, so
that the sums are the same to the last bit.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.atomic import attempt, reporting_full_disk
from models.blocks import find_block
from models.streaming.model import LayerCall, StreamedModel, argument_bytes
from stages.calibrate.observer import Routed, watching
from stages.calibrate.recorder import Recorder
from stages.corpus.blocks import Batch
from stages.model import batch_of, pad_id

_Arguments = tuple[Tensor, list[LayerCall]]  # [B, S] mask; one call per layer
# Masks and rotary embeddings of a shard are kept up to this size, and made again beyond it.
KEPT_ARGUMENT_BYTES = 64 << 20
_SUFFIX = ".hidden.tmp"


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
        shard = _Shard(model, batches, folder)
        # Nothing is observed behind the last sparse layer.
        for index in range(max(sparse, default=-1) + 1):
            with model.layer(index) as layer:
                for number, batch in enumerate(batches):
                    recorder.add(batch, shard.advance(number, layer, index))


class _Shard:
    """The batches of a shard on their way through the layers."""

    def __init__(self, model: StreamedModel, batches: Sequence[Batch], folder: Path) -> None:
        self._model = model
        self._batches = batches
        self._files = [HiddenStates(folder / f"batch-{i:05d}") for i in range(len(batches))]
        self._kept: dict[int, _Arguments] = {}
        self._room = KEPT_ARGUMENT_BYTES

    def advance(self, number: int, layer: nn.Module, index: int) -> dict[int, Routed]:
        """Takes one batch through one layer; what its MoE block did, if it has one."""
        mask, calls = self._kept.get(number) or self._arguments(number, first=index == 0)
        file, call, block = self._files[number], calls[index], find_block(layer)
        hidden = file.read(call.hidden).to(self._model.device)
        with watching({} if block is None else {index: block}, mask) as seen:
            file.write(call.run(layer, hidden))
        return seen

    def _arguments(self, number: int, *, first: bool) -> _Arguments:
        """What the model passes to its layers; hidden states are stored `first`, then let go."""
        model, rows = self._model, self._batches[number].rows
        ids, mask = batch_of(rows, pad_id(model), model.device)
        calls = model.calls(input_ids=ids, attention_mask=mask)
        if first:
            self._files[number].write(calls[0].hidden)
        found = mask, [call.without_hidden() for call in calls]
        size = argument_bytes(calls)
        if size <= self._room:
            self._room -= size
            self._kept[number] = found
        return found


class HiddenStates:
    """The hidden states `[B, S, H]` of one batch in a file, in the type that the model runs in.

    With momentum they are `[B, S, 1 + n, H]` between layers: a layer's output is stored whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shape: torch.Size | None = None

    def write(self, hidden: Tensor) -> None:
        """Over what is there. Not through the mapping: a full disk would kill the process."""
        raw = hidden.contiguous().view(torch.uint8).numpy(force=True)
        self._path.touch()
        self._shape = hidden.shape
        with reporting_full_disk(self._path), self._path.open("r+b") as file:
            file.write(raw.data)

    def read(self, like: Tensor) -> Tensor:
        """What was written, on the CPU, in the type of `like`; pages are read when touched.

        It has the shape of `like` unless layers pass more than a hidden state to each other.
        """
        shape, path = self._shape or like.shape, str(self._path)
        size = math.prod(shape)
        mapped = torch.from_file(path, shared=False, size=size, dtype=like.dtype, device="cpu")
        return mapped.view(shape)


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A folder beside the output that is gone afterwards."""
    # Two attempts at one shard never share hidden states.
    folder = output.with_name(f".{output.name}.{attempt()}{_SUFFIX}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(output: Path) -> None:
    """Frees what attempts at this shard left that were killed."""
    for folder in output.parent.glob(f".{output.name}.*{_SUFFIX}"):
        shutil.rmtree(folder, ignore_errors=True)
