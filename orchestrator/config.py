"""One run is one YAML file: this is its schema. Imports neither torch nor ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from orchestrator.slurm.config import SlurmConfig
from orchestrator.sweep.config import SweepConfig
from stages.align.config import AlignConfig
from stages.calibrate.config import CalibrateConfig
from stages.compress.config import CompressConfig
from stages.evaluate.config import EvaluateConfig
from stages.export.config import ExportConfig
from stages.group.config import Coalesce, GroupConfig, Uncurl
from stages.merge.config import MergeConfig
from stages.narrow.config import NarrowConfig
from stages.probe.config import ProbeConfig
from stages.recover.config import PruneConfig, PruneSchedule, RecoverConfig
from stages.refit.config import RefitConfig
from stages.settings import Settings
from stages.upload.config import UploadConfig


class ModelConfig(Settings):
    """The checkpoint to compress."""

    # A local folder, a URL (s3://bucket/prefix), or a Hugging Face hub name that is downloaded to
    # the cache.
    path: str
    revision: str | None = None
    # Folder with the tokenizer; the checkpoint's own by default.
    tokenizer: Path | None = None
    # Follow links that lead out of the checkpoint's folder (the Hugging Face cache always works).
    allow_links: bool = False
    # full: read every weight once and refuse NaN before anything is spent. headers: sizes only.
    verify: Literal["full", "headers"] = "full"


class CacheConfig(Settings):
    """Where the files of a checkpoint lie on each node (docs/storage.md). Results do not depend
    on it."""

    # A folder that every node has for itself; `$NAME` is read on the node. None: weights of a URL
    # go into the run folder.
    dir: Path | None = None
    # Also copy the files of a checkpoint folder, where that lies on a slow shared file system.
    local_paths: bool = False

    @model_validator(mode="after")
    def _copies_need_a_folder(self) -> Self:
        if self.local_paths and self.dir is None:
            raise ValueError("local_paths=true needs a folder to copy to: set cache.dir")
        return self


class RetryConfig(Settings):
    """How often one unit is run again, by cause. An error of the unit itself is not retried."""

    # The process was killed, its node was lost, or it lost the peers of its replica.
    lost: int = Field(default=3, ge=0)
    # The memory monitor of the node ended it.
    out_of_memory: int = Field(default=3, ge=0)


class ExecutorConfig(Settings):
    """Where units run. Results do not depend on it."""

    kind: Literal["local", "ray"] = "ray"
    # local: start a Ray for this run. auto, or ray://host:port: join one.
    address: str = "local"
    # Processes at the same time; None: one per CPU.
    workers: int | None = Field(default=None, gt=0)
    max_retries: RetryConfig = RetryConfig()
    # GPUs of one process that runs the model.
    gpus_per_worker: int = Field(default=0, ge=0)
    # Part of the arithmetic: sums depend on the number of threads in their last bits.
    threads_per_unit: int = Field(default=1, gt=0)
    # How evaluation and the reload gate hold a model: resident is whole, streaming one decoder
    # layer at a time. auto: whole where a worker's memory (calibrate.memory_bytes) has room for it.
    engine: Literal["resident", "streaming", "auto"] = "auto"
    # Calibration only: processes that hold one copy of the model together, each with its share of
    # the experts (DeepSpeed).
    ranks_per_replica: int = Field(default=1, gt=0)
    # A rank that is alive but has not answered the others for this long is taken for lost.
    rank_timeout_s: float = Field(default=900.0, gt=0)
    # STRICT_PACK: the ranks of a replica on one node. PACK: as few nodes as possible.
    placement: Literal["STRICT_PACK", "PACK"] = "STRICT_PACK"

    @model_validator(mode="after")
    def _replicas_need_ray(self) -> Self:
        ranks = self.ranks_per_replica
        if ranks > 1 and self.kind == "local":
            raise ValueError(f"ranks_per_replica={ranks} needs kind=ray: local is one process")
        if self.workers is not None and self.workers < ranks:
            raise ValueError(
                f"workers={self.workers} is less than ranks_per_replica={ranks}: not one replica"
                " fits"
            )
        return self


def _uncurl_as_printed(group: Any) -> bool:
    """Whether a section, as written or validated, is the preset `paper` of uncurl."""
    if isinstance(group, Mapping):
        return group.get("method") == "uncurl" and group.get("preset") == "paper"
    return isinstance(group, Uncurl) and group.preset == "paper"


class RunConfig(Settings):
    """A whole run. Every section's defaults are written beside the stage that it configures."""

    run_dir: Path
    model: ModelConfig
    calibrate: CalibrateConfig
    group: GroupConfig = Coalesce()
    align: AlignConfig = AlignConfig()
    merge: MergeConfig = MergeConfig()
    narrow: NarrowConfig = NarrowConfig()
    refit: RefitConfig = RefitConfig()
    # None: the experts that are left keep whole matrices.
    compress: CompressConfig | None = None
    export: ExportConfig = ExportConfig()
    # None: no value is trained.
    recover: RecoverConfig | None = None
    # Read where group.divide=probe.
    probe: ProbeConfig = ProbeConfig()
    # None: nothing is measured, and the report says so.
    evaluate: EvaluateConfig | None = None
    executor: ExecutorConfig = ExecutorConfig()
    # What `coalesce sweep` compares; runs do not read it.
    sweep: SweepConfig = SweepConfig()
    cache: CacheConfig = CacheConfig()
    # None: the checkpoint stays in the run folder alone.
    upload: UploadConfig | None = None
    # None: this run is not submitted to Slurm.
    slurm: SlurmConfig | None = None

    @property
    def written(self) -> ExportConfig:
        """What the files of the main variant look like: format, and how experts are decomposed."""
        compress = None if self.compress is None else self.compress.at_once
        return self.export.model_copy(update={"compress": compress})

    @property
    def pruning(self) -> PruneConfig | None:
        """How rows of S go in training; None: what stays is decided before any."""
        compress, recover = self.compress, self.recover
        if compress is None or recover is None or compress.importance != "sensitivity":
            return None
        return PruneConfig(
            target=compress.sparse,
            threshold=compress.threshold,
            multiple=compress.multiple,
            **(recover.prune or PruneSchedule()).model_dump(),
        )

    @model_validator(mode="before")
    @classmethod
    def _paper_redraws_the_router(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not _uncurl_as_printed(values.get("group")):
            return values
        export = values.get("export", {})
        if isinstance(export, Mapping):
            return {**values, "export": {"router": "reinit", **export}}
        return values

    @model_validator(mode="after")
    def _paper_as_printed(self) -> Self:
        if not isinstance(self.group, Uncurl) or self.group.preset != "paper":
            return self
        wrong = [
            name
            for name, as_printed in (
                ("export.router=reinit", self.export.router == "reinit"),
                ("align.enabled=true", self.align.enabled),
                ("align.by=weights", self.align.by == "weights"),
                ("align.reference=method", self.align.reference in ("method", "most_frequent")),
                ("merge.weights=method", self.merge.weights in ("method", "frequency")),
                ("refit.enabled=auto", self.refit.enabled is not True),
                ("no section compress", self.compress is None),
            )
            if not as_printed
        ]
        if wrong:
            raise ValueError(f"group.preset=paper of uncurl has {', '.join(wrong)}")
        return self

    @model_validator(mode="after")
    def _one_place_to_compress(self) -> Self:
        if self.export.compress is not None:
            raise ValueError("write the section `compress` beside `export`, not in it")
        if self.compress is not None and self.compress.numbers is not None:
            raise ValueError("compress.numbers is decided by compress.threshold=global, not given")
        return self

    @model_validator(mode="after")
    def _sensitivity_comes_from_training(self) -> Self:
        compress, recover = self.compress, self.recover
        if compress is None or compress.importance != "sensitivity":
            if recover is not None and recover.prune is not None:
                raise ValueError("recover.prune belongs to compress.importance=sensitivity")
            return self
        asks = "compress.importance=sensitivity"
        if recover is None:
            raise ValueError(
                f"{asks} is measured by the gradients of a training, and there is no section"
                " `recover`: add one, or set compress.importance=activations (or weights)"
            )
        deepspeed = recover.deepspeed
        wrong = [
            need
            for need, met in (
                ("recover.mode=experts or full: others do not train S", recover.mode != "router"),
                ("export.format=mapped: others do not store S", self.export.format == "mapped"),
                ("compress.sparse above 0: there are no rows to choose", compress.sparse > 0),
                (
                    "recover.deepspeed.zero_stage 0, 1 or 2: with 3 no rank has whole rows",
                    deepspeed is None or deepspeed.zero_stage < 3,
                ),
            )
            if not met
        ]
        if wrong:
            raise ValueError(f"{asks} needs {'; '.join(wrong)}")
        return self

    @model_validator(mode="after")
    def _ranks_need_ray(self) -> Self:
        recover = self.recover
        if recover is not None and recover.dealt_out and self.executor.kind == "local":
            raise ValueError(
                f"recover.ranks={recover.ranks} with DeepSpeed needs executor.kind=ray; one process"
                " trains without it: recover.ranks=1 and recover.deepspeed=null"
            )
        return self

    @model_validator(mode="after")
    def _autoep_needs_ranks(self) -> Self:
        calibrate, ranks = self.calibrate, self.executor.ranks_per_replica
        if calibrate.backend == "autoep" and ranks == 1:
            raise ValueError("calibrate.backend=autoep needs executor.ranks_per_replica above 1")
        if calibrate.backend == "autoep" and calibrate.engine == "streaming":
            raise ValueError(
                "calibrate.backend=autoep cannot stream: set calibrate.engine=resident"
            )
        return self
