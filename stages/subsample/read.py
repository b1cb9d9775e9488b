"""Reads what all experts of a layer did on the sampled tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from models.arrow import read_table
from stages.errors import StatisticsError
from stages.subsample.columns import SCALARS, VECTORS, Sums, from_table
from stages.subsample.pairs import PairErrors, pair_errors


@dataclass(frozen=True)
class SubsampleStatistics:
    """One layer; the arrays of each domain are those of `columns.empty_sums`."""

    layer: int
    domains: dict[str, Sums]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> SubsampleStatistics:
        """Opens one layer's table.

        Raises:
            StatisticsError: missing, damaged or another kind of table.
        """
        try:
            table = read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise StatisticsError(f"cannot read subsample from {path}: {error}") from error
        missing = [name for name in SCALARS + VECTORS if name not in table.column_names]
        if missing:
            raise StatisticsError(f"{path} is no subsample table: it lacks {', '.join(missing)}")
        found = table.schema.metadata or {}
        metadata = {key.decode(): value.decode() for key, value in found.items()}
        return cls(table["layer"][0].as_py(), from_table(table), metadata)

    def summed(self, weights: Mapping[str, float] | None = None) -> Sums:
        """The sum over domains in sorted order, each times its weight; those not named count once.

        Counts of weighted sums are float64.
        """
        total: Sums = {}
        for domain, sums in sorted(self.domains.items()):
            weight = 1.0 if weights is None else weights.get(domain, 1.0)
            for name, values in sums.items():
                part = values if weights is None else weight * values
                total[name] = total[name] + part if name in total else np.array(part)
        return total

    def pair_errors(self, weights: Mapping[str, float] | None = None) -> PairErrors:
        """Errors of merging and remapping every pair, over all domains."""
        sums = self.summed(weights)
        return pair_errors(sums["swap"], sums["both"])
