"""Calibration by a replica of several ranks: the same shards, statistics and files.

A replica takes a bundle of up to N shards at a time, one per rank. Every rank observes its own
shard, batch by batch, as a single process does, and writes it; the ranks only step together,
because a forward pass of one needs the experts of all. A rank that has no batch left, or no shard,
runs one token that counts nowhere. No sums are exchanged: how many ranks there are shows in
nothing that is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.expert_parallel import ExpertGroup
from models.streaming.model import StreamedModel
from stages.calibrate import autoep
from stages.calibrate.config import Backend, Engine
from stages.calibrate.distributed import open_rank
from stages.calibrate.observer import Routed
from stages.calibrate.recorder import Recorder
from stages.calibrate.stage import ShardUnit, batches_of, observe, recorder_of, summary, write_shard
from stages.corpus.blocks import Batch, Block
from stages.passage import remove_stale
from stages.unit import Done, execute, finished

# One token, for the sake of the other ranks.
IDLE = Batch(-1, (Block("", (0,)),))


class Rank:
    """One rank of a replica; holds its part of the model from shard to shard."""

    def __init__(self, group: ExpertGroup, backend: Backend = "thin") -> None:
        self._group = group
        self._backend = backend
        self._loaded: tuple[tuple[Path, str, Engine], StreamedModel] | None = None

    def run(self, bundle: Sequence[ShardUnit]) -> Done | None:
        """This rank's shard of the bundle, observed in step with the other ranks.

        Returns:
            its outcome; None for a rank beyond the end of the bundle.
        """
        own = bundle[self._group.rank] if self._group.rank < len(bundle) else None
        done = None if own is None else finished(own)
        found = [] if own is None or done is not None else batches_of(own)
        steps = self._group.largest(len(found))
        if own is not None and found:
            return execute(own, lambda unit: self._run_one(unit, found, steps))
        if steps:
            self._accompany(bundle[0], steps)
        return done

    def _run_one(self, unit: ShardUnit, found: Sequence[Batch], steps: int) -> dict[str, Any]:
        recorder = recorder_of(unit, OwnBatches)
        remove_stale(unit.output)
        self._observe(unit, [*found, *[IDLE] * (steps - len(found))], recorder)
        write_shard(unit, recorder)
        return summary(unit, found)

    def _accompany(self, unit: ShardUnit, steps: int) -> None:
        """Answers for this rank's experts while the others observe."""
        # Its hidden states are no leftovers of the shard's, and lie beside them.
        aside = unit.output.with_name(f"rank-{self._group.rank}.{unit.output.name}")
        unit = replace(unit, output=aside)
        self._observe(unit, [IDLE] * steps, OwnBatches(unit.num_experts))

    def _observe(self, unit: ShardUnit, found: Sequence[Batch], recorder: Recorder) -> None:
        key = (unit.model, unit.dtype, unit.engine)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # the old model must not stay while the new one is read
            self._loaded = (key, open_rank(*key, self._backend, self._group))
        model = self._loaded[1]
        if self._backend == "autoep":
            for batch in found:
                autoep.observe_batch(model.model, batch, recorder)
        else:
            observe(model if unit.engine == "streaming" else model.model, unit, found, recorder)


class OwnBatches(Recorder):
    """Counts everything but the idle steps."""

    def add(self, batch: Batch, seen: Mapping[int, Routed]) -> None:
        """What one batch did in the layers that were watched."""
        if batch is not IDLE:
            super().add(batch, seen)


def make_rank(
    group: ExpertGroup, backend: Backend = "thin"
) -> Callable[[Sequence[ShardUnit]], Done | None]:
    """One rank's worker for `cluster.executor.Replicas`."""
    return Rank(group, backend).run
