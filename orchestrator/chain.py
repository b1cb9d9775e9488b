"""Refitting behind reduced layers: block after block, and where to go on after a kill.

A finished layer stays whatever happens. The streams between two blocks of layers are kept until the
next block has its own; where they are gone and needed again, they are carried once more through the
layers that are finished, from the nearest block that still has them or from the first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from models.atomic import text_digest
from orchestrator import estimate, samples
from orchestrator.preflight import Prepared, Variant
from stages.carry import stage as carry
from stages.carry.blocks import LayerBlock, cut
from stages.carry.stage import CarryUnit
from stages.corpus.stage import tokenizer_digest
from stages.group.decision import LayerDecision
from stages.transform import stage as transform
from stages.transform.stage import TransformUnit
from stages.unit import Unit, beside, finished, read_digests


class Schedule(Protocol):
    """Runs the units of a stage: `Scheduler.run`."""

    def __call__(
        self,
        stage: str,
        units: Sequence[Any],
        run_one: Callable[[Any], dict[str, Any]],
        memory_bytes: int,
    ) -> object:
        """Returns once all are done."""


@dataclass(frozen=True)
class Chain:
    """The refitted layers of one variant."""

    run: Prepared
    variant: Variant
    decisions: Sequence[LayerDecision]
    blocks: Sequence[LayerBlock]
    units: dict[int, TransformUnit]  # layer -> its unit, without what is carried to it

    @property
    def folder(self) -> Path:
        """Streams and targets; gone when all layers are finished."""
        return self.run.folder.refit

    @property
    def corpus(self) -> Path:
        """The text that was observed, by this run or by the one whose statistics are used."""
        return samples.observed(self.run.folder, self.run.config.calibrate).calibration_tokens

    def carries(self, block: LayerBlock, done: Sequence[TransformUnit]) -> list[CarryUnit]:
        """What carries the text to a block, once the layers `done` before it are finished."""
        first = self.units[block.layers[0]]
        assert first.inputs is not None
        sample, digest = first.inputs
        before = self.blocks[block.index - 1] if block.index else None
        files = () if before is None else tuple((n, self.units[n].output) for n in before.layers)
        config = self.run.config
        inputs = {
            "model": self.run.model,
            "tokenizer": tokenizer_digest(self.run.tokenizer),
            "corpus": read_digests(beside(self.corpus)),
            "sample": digest,
            "threads": str(config.executor.threads_per_unit),
        }
        size = config.calibrate.batch_size
        return [
            CarryUnit(
                block=block,
                before=before,
                files=files,
                last=block.index == len(self.blocks) - 1,
                part=part,
                start=start,
                stop=stop,
                moe=self.run.moe,
                decisions=tuple(self.decisions),
                export=self.variant.export,
                corpus=self.corpus,
                sample=sample,
                batch_size=size,
                folder=self.folder,
                inputs=tuple(sorted(inputs.items())),
                upstream=text_digest([read_digests(unit.marker) for unit in done]),
            )
            for part, (start, stop) in enumerate(
                carry.ranges(sample, size, config.calibrate.shards)
            )
        ]

    def transforms(self, block: LayerBlock, units: Sequence[CarryUnit]) -> list[TransformUnit]:
        """The layers of a block, fitted to what `units` carry there.

        They are told by what is carried, not by the files it lies in, which do not stay.
        """
        paths = tuple(unit.output for unit in units)
        digest = text_digest([unit.fingerprint for unit in units])
        return [replace(self.units[n], carried=(paths, digest)) for n in block.layers]


def written(
    run: Prepared,
    variant: Variant,
    decisions: Sequence[LayerDecision],
    units: Sequence[TransformUnit],
    schedule: Schedule,
    others: Sequence[TransformUnit] = (),
) -> list[TransformUnit]:
    """Writes all layer files of a variant, and `others` beside them.

    Returns:
        the variant's units, with what their layers were fitted to.
    """
    chain = chain_of(run, variant, decisions, units)
    if chain is None:
        schedule("transform", [*units, *others], transform.run_one, estimate.transform(run))
        return list(units)
    free = [unit for unit in units if unit.layer not in chain.units]
    fitted = run_chain(chain, schedule, [*free, *others])
    return [fitted.get(unit.layer, unit) if unit.layer is not None else unit for unit in units]


def chain_of(
    run: Prepared,
    variant: Variant,
    decisions: Sequence[LayerDecision],
    units: Sequence[TransformUnit],
) -> Chain | None:
    """The chain through the refitted layers of a variant; None: each is fitted for itself."""
    refitted = {unit.layer: unit for unit in units if unit.refitted and unit.layer is not None}
    size = run.config.refit.together
    if size is None or not refitted:
        return None
    return Chain(run, variant, decisions, cut(sorted(refitted), size), refitted)


def run_chain(
    chain: Chain, schedule: Schedule, beside_it: Sequence[TransformUnit] = ()
) -> dict[int, TransformUnit]:
    """Refits block after block.

    Args:
        beside_it: units that depend on no block; they run at once.

    Returns:
        layer -> its unit, finished.
    """
    done, open_blocks = _finished(chain)
    transforms, carries = estimate.transform(chain.run), estimate.carry(chain.run)
    schedule("transform", [*beside_it, *done], transform.run_one, transforms)
    if open_blocks:
        for block in _to_carry(chain, open_blocks[0], done):
            earlier = done[: _layers_before(chain, block)]
            schedule("carry", chain.carries(block, earlier), carry.run_one, carries)
            _free(chain, block)
    for block in open_blocks:
        units = chain.carries(block, done)
        if block is not open_blocks[0]:
            schedule("carry", units, carry.run_one, carries)
            _free(chain, block)
        fitted = chain.transforms(block, units)
        schedule("transform", fitted, transform.run_one, transforms)
        done += fitted
    shutil.rmtree(chain.folder, ignore_errors=True)
    return {unit.layer: unit for unit in done if unit.layer is not None}


def _finished(chain: Chain) -> tuple[list[TransformUnit], list[LayerBlock]]:
    """Layers that are done with intact files, and the blocks that follow them."""
    done: list[TransformUnit] = []
    for block in chain.blocks:
        units = chain.transforms(block, chain.carries(block, done))
        if not all(map(_is_intact, units)):
            return done, list(chain.blocks[block.index :])
        done += units
    return done, []


def _to_carry(
    chain: Chain, block: LayerBlock, done: Sequence[TransformUnit]
) -> Sequence[LayerBlock]:
    """Blocks to which streams are carried, so that `block` has its own: those behind the last one
    whose streams are all there, and that one, to be looked at where they lie."""
    for index in range(block.index, -1, -1):
        each = chain.blocks[index]
        if all(map(_is_intact, chain.carries(each, done[: _layers_before(chain, each)]))):
            return chain.blocks[index : block.index + 1]
    return chain.blocks[: block.index + 1]


def _layers_before(chain: Chain, block: LayerBlock) -> int:
    return sum(len(each.layers) for each in chain.blocks[: block.index])


def _free(chain: Chain, block: LayerBlock) -> None:
    """Removes what was carried to the blocks before one that has its own streams."""
    for each in chain.blocks[: block.index]:
        shutil.rmtree(chain.folder / each.name, ignore_errors=True)


def _is_intact(unit: Unit) -> bool:
    return finished(unit) is not None
