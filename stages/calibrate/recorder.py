"""What one shard gathers while its batches pass: every engine hands each pass over to this."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from stages.calibrate.finite import refuse_not_finite
from stages.calibrate.observer import Routed, Sums
from stages.calibrate.statistics import Key, accumulate, to_table
from stages.corpus.blocks import Batch


class Recorder:
    """Adds up what the MoE blocks did. Within a layer, batches must come in their own order."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self.sums: dict[Key, Sums] = {}

    def add(self, batch: Batch, seen: Mapping[int, Routed]) -> None:
        """What one batch did in the layers that were watched.

        Raises:
            StatisticsError: a router's logits or an expert's outputs are not finite.
        """
        for layer, routed in seen.items():
            refuse_not_finite(layer, routed, batch)
        accumulate(self.sums, batch.domain, seen, self._num_experts)

    def table(self, metadata: Mapping[str, str]) -> pa.Table:
        """The shard's statistics."""
        return to_table(self.sums, self._num_experts, metadata)
