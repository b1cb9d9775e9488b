"""Carries a part of the text to the next block of layers, and keeps what they are fitted to.

The original residual stream passes the original layers; the compressed one passes the finished
layers of the blocks before, then the original layers of this block. What both were before and
behind each refitted layer makes its target (docs/reduction.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.atomic import attempt, link_or_copy
from models.moe import MoeCheckpoint
from models.tensors import write_tensors
from stages.carry.blocks import LayerBlock
from stages.carry.text import edges, read_text, sampled_blocks
from stages.carry.walk import Walk
from stages.export.config import ExportConfig
from stages.group.decision import LayerDecision
from stages.unit import Fingerprint, beside

VERSION = 2
_SUFFIX = ".hidden.tmp"


@dataclass(frozen=True)
class CarryUnit:
    """Sampled blocks of text `start` to `stop` - 1, through one block of layers."""

    block: LayerBlock
    # The block before, and its finished layers; None: this is the first one.
    before: LayerBlock | None
    files: tuple[tuple[int, Path], ...]
    last: bool  # no block follows: no stream is kept
    part: int
    start: int
    stop: int
    moe: MoeCheckpoint
    decisions: tuple[LayerDecision, ...]
    export: ExportConfig
    corpus: Path
    sample: Path  # sampled inputs of any layer: which tokens
    batch_size: int
    folder: Path  # of all blocks
    # Model, tokenizer and corpus digests, digest of the sample, threads.
    inputs: tuple[tuple[str, str], ...]
    upstream: str  # digest of all finished layers before the block

    @property
    def name(self) -> str:
        """`carry/block-00002/part-00000`."""
        return f"carry/{self.block.name}/part-{self.part:05d}"

    @property
    def output(self) -> Path:
        """Inputs, routing and targets of the sampled tokens, of every refitted layer."""
        return self._place(self.block, ".safetensors")

    @property
    def outputs(self) -> Sequence[Path]:
        """Targets; where another block follows, both streams as well."""
        streams = (self.original(self.block), self.compressed(self.block))
        return (self.output,) if self.last else (self.output, *streams)

    @property
    def marker(self) -> Path:
        """Beside the targets."""
        return beside(self.output)

    def original(self, block: LayerBlock) -> Path:
        """The original stream behind a block."""
        return self._place(block, ".original")

    def compressed(self, block: LayerBlock) -> Path:
        """The compressed stream before a block."""
        return self._place(block, ".compressed")

    def _place(self, block: LayerBlock, suffix: str) -> Path:
        return self.folder / block.name / f"part-{self.part:05d}{suffix}"

    @property
    def fingerprint(self) -> Fingerprint:
        """Text, original model, layers of the block, and everything that is finished before it."""
        return dict(self.inputs) | {
            "code": f"carry-{VERSION}",
            "config": {"batch_size": self.batch_size},
            "part": [self.start, self.stop],
            "layers": [self.block.start, list(self.block.layers), self.block.stop],
            "upstream": self.upstream,
        }


def ranges(sample: Path, batch_size: int, parts: int) -> list[tuple[int, int]]:
    """How the sampled blocks of text are cut into at most `parts` parts."""
    return edges(len(sampled_blocks(sample)), batch_size, parts)


def run_one(unit: CarryUnit) -> dict[str, Any]:
    """Writes targets and streams of one part.

    Raises:
        CheckpointError: a layer cannot be read, or has no target. DiskFull: no room for streams.
    """
    text = read_text(unit.corpus, unit.sample, unit.start, unit.stop, unit.batch_size)
    with _scratch(unit.output) as folder:
        walk = Walk(unit.moe, text, unit.block, folder)
        if unit.before is None:
            walk.begin()
        else:
            streams = unit.original(unit.before), unit.compressed(unit.before)
            walk.resume(*streams, unit.before, unit.decisions, unit.export, dict(unit.files))
        found = walk.pass_block()
        if not unit.last:
            link_or_copy(walk.compressed.path, unit.compressed(unit.block))
            link_or_copy(walk.original.path, unit.original(unit.block))
        write_tensors(unit.output, found.tensors)
    return {"tokens": text.tokens, "layers": list(unit.block.layers), "drift": found.drift}


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder beside the output that is gone afterwards, and so are those of killed attempts."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in output.parent.glob(f".{output.name}.*{_SUFFIX}"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = output.with_name(f".{output.name}.{attempt()}{_SUFFIX}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
