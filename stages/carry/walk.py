"""A part of the text on its way through layers, in both models; one layer is in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.blocks import MoeBlock, find_block
from models.moe import MoeCheckpoint
from models.streaming.model import LayerCall, argument_bytes, hidden_of, open_streamed
from stages.carry.blocks import LayerBlock
from stages.carry.capture import Seen, capturing, factor
from stages.carry.reduced import open_reduced
from stages.carry.stream import Stream
from stages.carry.text import Text
from stages.export.config import ExportConfig
from stages.group.decision import LayerDecision
from stages.model import batch_of, pad_id
from stages.passage import KEPT_ARGUMENT_BYTES

# Tokens on which it is found out what a layer does with its experts' sum.
_PROBED = 8


@dataclass
class Found:
    """What the layers of a block are fitted to."""

    # `l.hidden` and `l.target` [n, H], `l.gates` [n, k] float32, `l.ids` [n, k] int64 per layer l.
    # Of the model's last layer, alone in its block: `l.stream` [n, H], the original residual stream
    # behind it, and `l.factor` [1], what the experts' sum is multiplied with.
    tensors: dict[str, Tensor] = field(default_factory=dict)
    # Layer -> squared size of what the stream behind it is off, and of the original stream.
    drift: dict[str, tuple[float, float]] = field(default_factory=dict)


class Walk:
    """Both streams of one part of the text.

    Args:
        moe: the original.
        block: the layers that are to be refitted next.
        folder: for the streams.
    """

    def __init__(self, moe: MoeCheckpoint, text: Text, block: LayerBlock, folder: Path) -> None:
        self._moe, self._text, self._block, self._folder = moe, text, block, folder
        self._model = open_streamed(moe.checkpoint.folder, "float32")
        self._kept: dict[int, list[LayerCall]] = {}
        self._room = KEPT_ARGUMENT_BYTES
        # Behind the layers that were passed; before the block; and within it.
        self.original = self._stream(folder / "original")
        self.compressed = self._stream(folder / "compressed")
        self._drifted = self._stream(folder / "drifted")
        self._first = False

    @torch.inference_mode()
    def begin(self) -> None:
        """Before the first layer both streams are the embeddings."""
        self._first = True
        for number in range(len(self._text.batches)):
            self.compressed.write(number, self._calls(number, whole=True)[0].hidden)
        self._source = self.compressed

    @torch.inference_mode()
    def resume(
        self,
        original: Path,
        compressed: Path,
        before: LayerBlock,
        decisions: Sequence[LayerDecision],
        export: ExportConfig,
        files: Mapping[int, Path],
    ) -> None:
        """Takes the compressed stream through the block before, whose finished layers are `files`.

        Args:
            original: the original stream behind that block.
            compressed: the compressed one before it.
        """
        self._source = self._stream(original)
        place = self._folder / "model"
        place.mkdir()
        reduced = open_reduced(self._moe, decisions, export, files, place)
        source = self._stream(compressed)
        for index in range(before.start, before.stop):
            with (reduced if index in files else self._model).layer(index) as layer:
                for number in range(len(self._text.batches)):
                    self.compressed.write(number, self._run(layer, index, number, source))
            source = self.compressed

    @torch.inference_mode()
    def pass_block(self) -> Found:
        """Takes both streams through the original layers of the block."""
        found = Found()
        for index in range(self._block.start, self._block.stop):
            with self._model.layer(index) as layer:
                moe = find_block(layer) if index in self._block.layers else None
                if moe is None:
                    self._pass_on(layer, index)
                else:
                    self._pass_fitted(layer, moe, index, found)
        return found

    def _pass_on(self, layer: nn.Module, index: int) -> None:
        """A layer that stays as it is."""
        for number in range(len(self._text.batches)):
            self.original.write(number, self._run(layer, index, number, self._before(index)))
            if not self._first:
                self._drifted.write(number, self._run(layer, index, number, self._entry(index)))

    def _pass_fitted(self, layer: nn.Module, moe: MoeBlock, index: int, found: Found) -> None:
        """A layer that is refitted: what it is given at sampled tokens, and what it is to give."""
        probe = self._model.calls(**self._probe())[index]
        name = f"layer {index} of {self._model.config.model_type}"
        scale = self._block.share / factor(layer, moe, probe, name)
        parts, streams, off, size = [], list[Tensor](), 0.0, 0.0
        for number, rows in enumerate(self._text.rows):
            seen, wanted, had = self._both(layer, moe, index, number)
            missing = wanted - had
            parts.append((seen, seen.made + scale * missing))
            streams.append(wanted)
            off, size = off + _squared(missing), size + _squared(wanted)
            assert len(seen.hidden) == len(rows)
        kinds = ("hidden", "ids", "gates")
        found.tensors |= {
            f"{index}.{kind}": torch.cat([getattr(seen, kind) for seen, _ in parts])
            for kind in kinds
        }
        found.tensors[f"{index}.target"] = torch.cat([target for _, target in parts])
        if index == len(self._model.layers) - 1 and self._block.share == 1:
            found.tensors[f"{index}.stream"] = torch.cat(streams)
            found.tensors[f"{index}.factor"] = torch.tensor([1 / scale])
        found.drift[str(index)] = off, size

    def _both(
        self, layer: nn.Module, moe: MoeBlock, index: int, number: int
    ) -> tuple[Seen, Tensor, Tensor]:
        """One batch through one layer in both streams: what the experts did on the compressed one,
        and the [n, H] original and compressed stream behind the layer at sampled tokens."""
        rows = self._text.rows[number].to(self._model.device)
        last = index == self._block.stop - 1
        with capturing(moe, rows, everywhere=True) as heard:
            behind = self._run(layer, index, number, self._before(index))
        self.original.write(number, behind)
        wanted = _picked(behind, rows)
        if self._first:  # nothing is reduced yet: the streams are one
            return heard[0], wanted, wanted
        with capturing(moe, rows, everywhere=not last) as heard:
            behind = self._run(layer, index, number, self._entry(index))
        if not last:
            self._drifted.write(number, behind)
        return heard[0], wanted, _picked(behind, rows)

    def _before(self, index: int) -> Stream:
        """The original stream before a layer of the block."""
        return self._source if index == self._block.start else self.original

    def _entry(self, index: int) -> Stream:
        """The compressed stream before a layer of the block."""
        return self.compressed if index == self._block.start else self._drifted

    def _run(self, layer: nn.Module, index: int, number: int, source: Stream) -> Tensor:
        """What is behind a layer: [B, S, H], or with momentum [B, S, 1 + n, H]."""
        hidden = source.read(number).to(self._model.device)
        return self._calls(number)[index].run(layer, hidden)

    def _calls(self, number: int, *, whole: bool = False) -> list[LayerCall]:
        """How the model calls its layers for a batch; with the hidden states if `whole`."""
        if not whole and number in self._kept:
            return self._kept[number]
        rows = self._text.batches[number].rows
        ids, mask = batch_of(rows, pad_id(self._model), self._model.device)
        calls = self._model.calls(input_ids=ids, attention_mask=mask)
        if whole:
            return calls
        found, size = [call.without_hidden() for call in calls], argument_bytes(calls)
        if size <= self._room:
            self._room -= size
            self._kept[number] = found
        return found

    def _probe(self) -> dict[str, Tensor]:
        """A few tokens of the text."""
        row = self._text.batches[0].rows[0][:_PROBED]
        ids, mask = batch_of([row], pad_id(self._model), self._model.device)
        return {"input_ids": ids, "attention_mask": mask}

    def _stream(self, path: Path) -> Stream:
        return Stream(path, self._text.shapes, self._moe.hidden_size, self._model.states)


def _picked(states: Tensor, rows: Tensor) -> Tensor:
    """[n, H] hidden states of [B, S, H] or [B, S, 1 + n, H], on the CPU."""
    hidden = hidden_of(states)
    return hidden.reshape(-1, hidden.shape[-1])[rows].float().cpu()


def _squared(values: Tensor) -> float:
    return float(values.double().square().sum())
