"""What one shard gathers while its batches pass: every engine hands each pass over to this."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from stages.calibrate.observer import Routed, Sums, add, empty_sums
from stages.calibrate.sample import Sample
from stages.calibrate.sampled import SampledInputs
from stages.calibrate.statistics import Key, accumulate, to_table
from stages.corpus.blocks import Batch


class Recorder:
    """Adds up what the MoE blocks did. Within a layer, batches must come in their own order."""

    def __init__(self, num_experts: int, sample: Sample | None = None) -> None:
        self._num_experts = num_experts
        self.sums: dict[Key, Sums] = {}
        # None: no inputs are kept.
        self.sampled = None if sample is None else SampledInputs(sample)

    def add(self, batch: Batch, seen: Mapping[int, Routed]) -> None:
        """What one batch did in the layers that were watched."""
        accumulate(self.sums, batch.domain, seen, self._num_experts)
        if self.sampled is not None:
            self.sampled.add(batch, seen)

    def extend(self, other: Recorder) -> None:
        """Adds what another recorder took from other batches of the same shard."""
        for key, sums in other.sums.items():
            add(self.sums.setdefault(key, empty_sums(self._num_experts)), sums)
        if self.sampled is not None and other.sampled is not None:
            self.sampled.extend(other.sampled)

    def table(self, metadata: Mapping[str, str]) -> pa.Table:
        """The shard's statistics."""
        return to_table(self.sums, self._num_experts, metadata)
