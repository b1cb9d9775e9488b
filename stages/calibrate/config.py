"""Config of the calibrate stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stages.corpus.config import CorpusConfig, DedupConfig
from stages.settings import Settings

VERSION = 2
# Observed tokens, where nothing is said.
OBSERVED = 524_288
# Sampled tokens, where nothing speaks for more.
SAMPLED = 4096

Engine = Literal["resident", "streaming"]
Backend = Literal["thin", "autoep"]


class SampleConfig(Settings):
    """Tokens whose input to every MoE layer is kept, the same ones in all layers."""

    # 0: nothing is kept. Each layer's file takes 2 H bytes per token and more (bfloat16). auto:
    # 4,096, or all that are observed where a refit is thorough unasked (orchestrator/sizing.py).
    tokens: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    seed: int = 0
    # Evaluate all experts on these tokens: output and pair sums, neuron energies (subsample).
    statistics: bool = True
    # On so many of them at most: those that a sample of this size would have.
    statistics_tokens: int = Field(default=32_768, gt=0)

    @property
    def count(self) -> int:
        """Tokens; `auto` that was not settled is 4,096."""
        return SAMPLED if self.tokens == "auto" else self.tokens


class CalibrateConfig(Settings):
    """What is observed, and in how many independent shards."""

    # tokens: 524,288 unless given; less is taken where there is less.
    data: CorpusConfig
    # Documents that are also evaluated (`evaluate.data`).
    dedup: DedupConfig = DedupConfig()
    # Units of work and of loss: a killed run repeats at most the shards that were under way.
    shards: int = Field(default=8, gt=0)
    batch_size: int = Field(default=8, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # resident: a worker holds the whole model. streaming: one decoder layer at a time, any depth.
    # Statistics are the same, bit for bit; auto: resident wherever it fits.
    engine: Literal["resident", "streaming", "auto"] = "auto"
    # With executor.ranks_per_replica > 1. thin: around the family's own router and experts, exact
    # for any family. autoep: DeepSpeed's AutoEP layers, which route and add by themselves; only for
    # families that it has presets for, whole models in memory, and a table of their own.
    backend: Backend = "thin"
    # Memory of one worker that `auto` fits the model into. None: free memory of the host that
    # starts the run / workers, or the memory of one of its GPUs.
    memory_bytes: int | None = Field(default=None, gt=0)
    # null and tokens=0: off.
    sample: SampleConfig = SampleConfig()
    # Experts that were selected by fewer tokens are named when calibration ends; 0 names none.
    min_tokens_per_expert: int = Field(default=32, ge=0)
    # Decide again on what another run observed: its statistics.arrow. `data` is then not read.
    statistics: Path | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _much_text(cls, value: Any) -> Any:
        return {"tokens": OBSERVED} | dict(value) if isinstance(value, Mapping) else value

    @field_validator("sample", mode="before")
    @classmethod
    def _null_is_off(cls, value: Any) -> Any:
        return {"tokens": 0} if value is None else value
