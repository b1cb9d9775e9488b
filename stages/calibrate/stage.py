"""Calibration shards: each a range of token blocks, each an immutable Arrow file of sums.

Beside the sums lies what the shard kept of the sampled tokens (`calibrate.sample`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from models.arrow import write_table
from models.streaming.model import open_streamed
from models.tensors import write_tensors
from stages.calibrate import streaming
from stages.calibrate.config import VERSION, CalibrateConfig, Engine, SampleConfig
from stages.calibrate.merge_tables import add_files
from stages.calibrate.recorder import Recorder
from stages.calibrate.resident import observe_batch
from stages.calibrate.sample import sample_of
from stages.corpus.blocks import Batch, batches
from stages.corpus.stage import read_blocks
from stages.model import load_model
from stages.passage import remove_stale
from stages.unit import Fingerprint, OneFile

_NOTHING = SampleConfig(tokens=0)


@dataclass(frozen=True)
class ShardUnit(OneFile):
    """Observes blocks `start` to `stop` of the corpus."""

    index: int
    start: int
    stop: int
    corpus: Path
    model: Path
    num_experts: int
    dtype: str
    batch_size: int
    output: Path
    # Parts of the fingerprint that the shard cannot know: model, tokenizer and corpus digests.
    inputs: tuple[tuple[str, str], ...]
    # Not in the fingerprint: both engines give the same bytes, so either finishes a shard.
    engine: Engine = "resident"
    sample: SampleConfig = _NOTHING

    @property
    def sampled(self) -> Path:
        """Inputs of the sampled tokens: `shard-00003.inputs.safetensors`."""
        return self.output.with_suffix(".inputs.safetensors")

    @property
    def outputs(self) -> Sequence[Path]:
        """The sums, and the sampled inputs if there are any to keep."""
        return (self.output, self.sampled) if self.sample.count else (self.output,)

    @property
    def name(self) -> str:
        """`calibrate/shard-00003`."""
        return f"calibrate/shard-{self.index:05d}"

    @property
    def fingerprint(self) -> Fingerprint:
        """Inputs, block range and everything that changes the arithmetic."""
        config = {"dtype": self.dtype, "batch_size": self.batch_size}
        kept = {"tokens": self.sample.count, "seed": self.sample.seed}
        return dict(self.inputs) | {
            "code": f"calibrate-{VERSION}",
            "config": config | ({"sample": kept} if self.sample.count else {}),
            "blocks": [self.start, self.stop],
        }


def plan(
    config: CalibrateConfig,
    *,
    blocks: int,
    corpus: Path,
    model: Path,
    num_experts: int,
    folder: Path,
    inputs: dict[str, str],
    engine: Engine = "resident",
) -> list[ShardUnit]:
    """Cuts the corpus into ranges of nearly equal size, whole batches where that is possible."""
    batches = -(-blocks // config.batch_size)
    shards = min(config.shards, batches)
    edges = [i * batches // shards * config.batch_size for i in range(shards)] + [blocks]
    return [
        ShardUnit(
            index=index,
            start=start,
            stop=stop,
            corpus=corpus,
            model=model,
            num_experts=num_experts,
            dtype=config.dtype,
            batch_size=config.batch_size,
            output=folder / f"shard-{index:05d}.arrow",
            inputs=tuple(sorted(inputs.items())),
            engine=engine,
            sample=config.sample,
        )
        for index, (start, stop) in enumerate(pairwise(edges))
    ]


class Replica:
    """One copy of the model, whole or streamed, opened when the first unfinished shard arrives."""

    def __init__(self) -> None:
        self._loaded: tuple[tuple[Path, str, Engine], Any] | None = None

    def run_one(self, unit: ShardUnit) -> dict[str, Any]:
        """Observes one shard and writes its files."""
        found = batches_of(unit)
        recorder = recorder_of(unit)
        remove_stale(unit.output)
        observe(self._model(unit), unit, found, recorder)
        write_shard(unit, recorder)
        return summary(unit, found)

    def _model(self, unit: ShardUnit) -> Any:
        key = (unit.model, unit.dtype, unit.engine)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # the old one is let go before the new one takes its place
            load = open_streamed if unit.engine == "streaming" else load_model
            self._loaded = (key, load(unit.model, unit.dtype))
        return self._loaded[1]


def batches_of(unit: ShardUnit) -> list[Batch]:
    """The batches of a shard, the same for every engine and any number of ranks."""
    blocks = read_blocks(unit.corpus, unit.start, unit.stop)
    return list(batches(blocks, unit.batch_size, unit.start))


def recorder_of(unit: ShardUnit, kind: type[Recorder] = Recorder) -> Recorder:
    """What a shard, or a part of its batches, is gathered in."""
    sample = unit.sample
    kept = sample_of(unit.corpus, sample.count, sample.seed) if sample.count else None
    return kind(unit.num_experts, kept)


def write_shard(unit: ShardUnit, recorder: Recorder) -> None:
    """Writes all files of a shard from what was gathered, each atomically."""
    write_table(unit.output, recorder.table(dict(unit.inputs)))
    if recorder.sampled is not None:
        write_tensors(unit.sampled, recorder.sampled.tensors(unit.start, unit.stop))


def summary(unit: ShardUnit, found: Sequence[Batch]) -> dict[str, Any]:
    """The result of a shard for its marker and the report."""
    tokens = sum(len(row) for batch in found for row in batch.rows)
    return {"tokens": tokens, "blocks": unit.stop - unit.start, "engine": unit.engine}


def reduce(units: Sequence[ShardUnit]) -> pa.Table:
    """The sum over shards in shard order, each once, whatever order they ended in."""
    return add_files([unit.output for unit in units])


def observe(model: Any, unit: ShardUnit, found: Sequence[Batch], recorder: Recorder) -> None:
    """Takes the batches through the model by the unit's engine; both give the same sums."""
    if unit.engine == "streaming":
        streaming.observe(model, found, recorder, unit.output)
        return
    for batch in found:
        observe_batch(model, batch, recorder)


def make_worker() -> Callable[[ShardUnit], Any]:
    """A worker for `cluster.executor.Job`: holds one replica, resumes finished shards."""
    from stages.unit import execute

    replica = Replica()
    return lambda unit: execute(unit, replica.run_one)
