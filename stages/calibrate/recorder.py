"""What one shard gathers while its batches pass: every engine hands each pass over to this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa

from stages.calibrate.finite import refuse_not_finite
from stages.calibrate.observer import Routed, Sums, add, empty_sums, layer_sums
from stages.calibrate.sample import Sample
from stages.calibrate.sampled import SampledInputs
from stages.calibrate.statistics import Key, to_table
from stages.corpus.blocks import Batch

# Passes that wait to be added up one after the other: warm code and data take half the time.
_TOGETHER = 8


class Recorder:
    """Adds up what the MoE blocks did. Within a layer, batches must come in their own order."""

    def __init__(self, num_experts: int, sample: Sample | None = None) -> None:
        self._num_experts = num_experts
        self._sums: dict[Key, Sums] = {}
        self._waiting: list[tuple[Batch, int, Routed]] = []
        # None: no inputs are kept.
        self.sampled = None if sample is None else SampledInputs(sample)

    def add(self, batch: Batch, seen: Mapping[int, Routed]) -> None:
        """What one batch did in the layers that were watched.

        Raises:
            StatisticsError: a router's logits or an expert's outputs are not finite; of a layer
                that was handed over now or shortly before.
        """
        if self.sampled is not None:
            self.sampled.add(batch, seen)
        # Without their inputs: a model that cannot have this memory again asks for new pages.
        self._waiting += [(batch, n, replace(routed, hidden=None)) for n, routed in seen.items()]
        if len(self._waiting) >= _TOGETHER:
            self._add_up()

    @property
    def sums(self) -> dict[Key, Sums]:
        """Everything that was handed over, by domain and layer.

        Raises:
            StatisticsError: as `add`.
        """
        self._add_up()
        return self._sums

    def extend(self, other: Recorder) -> None:
        """Adds what another recorder took from other batches of the same shard."""
        for key, sums in other.sums.items():
            add(self.sums.setdefault(key, empty_sums(self._num_experts)), sums)
        if self.sampled is not None and other.sampled is not None:
            self.sampled.extend(other.sampled)

    def table(self, metadata: Mapping[str, str]) -> pa.Table:
        """The shard's statistics."""
        return to_table(self.sums, self._num_experts, metadata)

    def _add_up(self) -> None:
        waiting, self._waiting = self._waiting, []
        for batch, layer, routed in waiting:
            with np.errstate(all="ignore"):  # what is not finite is refused in the next line
                sums = layer_sums(routed, self._num_experts)
            refuse_not_finite(layer, routed, batch, sums)
            key = batch.domain, layer
            add(self._sums.setdefault(key, empty_sums(self._num_experts)), sums)
