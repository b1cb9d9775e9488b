"""Text on its way through a streamed model: each layer is read once and sees all batches.

Between layers the hidden states lie in memory-mapped files. Every batch meets the same operations
as with the whole model in memory, so that what comes out is the same to the last bit.
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
from models.streaming.model import LayerCall, StreamedModel, argument_bytes
from stages.model import batch_of, pad_id

Rows = Sequence[Sequence[int]]  # B rows of tokens
# Masks and rotary embeddings are kept up to this size, and made again beyond it.
KEPT_ARGUMENT_BYTES = 64 << 20
_SUFFIX = ".hidden.tmp"


class Passage:
    """Batches of text before, between and behind the layers.

    Args:
        model: streamed; the caller loads its layers, in their order.
        batches: the rows of every batch.
        folder: an empty one, for hidden states.
    """

    def __init__(self, model: StreamedModel, batches: Sequence[Rows], folder: Path) -> None:
        self._model = model
        self._batches = batches
        self._files = [HiddenStates(folder / f"batch-{i:05d}") for i in range(len(batches))]
        self._kept: dict[int, list[LayerCall]] = {}
        self._room = KEPT_ARGUMENT_BYTES

    def mask(self, number: int) -> Tensor:
        """[B, S] bool of one batch, on the model's device: False at padding."""
        return self._padded(number)[1]

    def inputs(self, number: int) -> dict[str, Tensor]:
        """What the model is called with for one batch."""
        ids, mask = self._padded(number)
        return {"input_ids": ids, "attention_mask": mask}

    def advance(self, number: int, layer: nn.Module, index: int) -> None:
        """Takes one batch through layer `index`, which is loaded.

        Raises:
            DiskFull: no room for its hidden states.
        """
        call = self._calls(number)[index]
        self._files[number].write(call.run(layer, self.hidden(number)))

    def hidden(self, number: int) -> Tensor:
        """[B, S, H] behind the layers that a batch has passed, on the model's device."""
        return self._files[number].read().to(self._model.device)

    def _calls(self, number: int) -> list[LayerCall]:
        """What the model passes to its layers; the first time, embeddings are stored."""
        if number in self._kept:
            return self._kept[number]
        calls = self._model.calls(**self.inputs(number))
        if not self._files[number].written:
            self._files[number].write(calls[0].hidden)
        found, size = [call.without_hidden() for call in calls], argument_bytes(calls)
        if size <= self._room:
            self._room -= size
            self._kept[number] = found
        return found

    def _padded(self, number: int) -> tuple[Tensor, Tensor]:
        return batch_of(self._batches[number], pad_id(self._model), self._model.device)


class HiddenStates:
    """The hidden states `[B, S, H]` of one batch in a file, in the type that the model runs in.

    With momentum they are `[B, S, 1 + n, H]` between layers: a layer's output is stored whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._form: tuple[torch.Size, torch.dtype] | None = None

    @property
    def written(self) -> bool:
        """Whether there is anything to read."""
        return self._form is not None

    def write(self, hidden: Tensor) -> None:
        """Over what is there. Not through the mapping: a full disk would kill the process."""
        raw = hidden.contiguous().view(torch.uint8).numpy(force=True)
        self._path.touch()
        self._form = hidden.shape, hidden.dtype
        with reporting_full_disk(self._path), self._path.open("r+b") as file:
            file.write(raw.data)

    def read(self) -> Tensor:
        """What was written, on the CPU; pages are read when touched."""
        assert self._form is not None, f"nothing was written to {self._path}"
        shape, dtype = self._form
        size, path = math.prod(shape), str(self._path)
        mapped = torch.from_file(path, shared=False, size=size, dtype=dtype, device="cpu")
        return mapped.view(shape)


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A folder beside the output that is gone afterwards."""
    # Two attempts at one output never share hidden states.
    folder = output.with_name(f".{output.name}.{attempt()}{_SUFFIX}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(output: Path) -> None:
    """Frees what attempts at this output left that were killed."""
    for folder in output.parent.glob(f".{output.name}.*{_SUFFIX}"):
        shutil.rmtree(folder, ignore_errors=True)
