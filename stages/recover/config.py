"""Config of the recover stage: how the reduced checkpoint is trained after the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stages.corpus.config import CorpusConfig
from stages.settings import Settings

VERSION = 2

# MC-SMoE, arXiv 2310.01334, section 3.3 and table A11; the scaling is that of its code.
_PAPER = {
    "alpha": 0.2,
    "temperature": 2.0,
    "scaling": "paper",
    "betas": (0.9, 0.98),
    "epsilon": 1e-6,
    "weight_decay": 0.01,
    "warmup": 16,
    "schedule": "linear",
    "learning_rate": 3e-5,
}

# For thousands of steps from a student that a refit has brought near the original: what the
# original says counts ten times as much as the text (docs/recover.md).
_LONG = {
    "alpha": 10.0,
    "temperature": 1.0,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "mode": "full",
    "batch": 8,
}
_PRESETS: dict[str, dict[str, Any]] = {"paper": _PAPER, "long": _LONG}


class TeacherConfig(Settings):
    """What is kept of the original's predictions, once, for all of training."""

    # A checkpoint folder to learn from, with the same tokens; None: the model that is reduced.
    path: Path | None = None
    # Likeliest tokens kept at every position; the mass of all others is one number more.
    # None: every token, exactly, at vocabulary x 8 bytes a position.
    top: int | None = Field(default=64, gt=0)
    # Units of work and of loss.
    shards: int = Field(default=8, gt=0)
    batch_size: int = Field(default=8, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # resident: a worker holds the original. streaming: one of its layers at a time. auto: whichever
    # calibration would take.
    engine: Literal["resident", "streaming", "auto"] = "auto"


class DeepSpeedConfig(Settings):
    """How values, gradients and moments are dealt out to the ranks (ZeRO, arXiv 1910.02054)."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    # Moments and fp32 values in the memory of the host.
    cpu_offload: bool = False
    # The model runs in bfloat16; values are still kept, and updated, in fp32.
    bf16: bool = False

    @model_validator(mode="after")
    def _rounded_values_have_others_behind_them(self) -> Self:
        if self.zero_stage == 0 and (self.bf16 or self.cpu_offload):
            raise ValueError("bf16 and cpu_offload need zero_stage 1, 2 or 3")
        return self


class PruneSchedule(Settings):
    """When rows of S go during training, and what they are ranked by."""

    # Steps before the first row goes, and steps at the end in which no more go. None: 4 and 16 % of
    # all steps, as in the paper.
    warmup: int | None = Field(default=None, ge=0)
    final: int | None = Field(default=None, ge=0)
    # Smoothing of the sensitivity.
    beta: float = Field(default=0.85, ge=0, lt=1)

    def phases(self, steps: int) -> tuple[int, int]:
        """Both numbers of steps, of so many."""
        warmup = steps * 4 // 100 if self.warmup is None else self.warmup
        return warmup, steps * 16 // 100 if self.final is None else self.final


class PruneConfig(PruneSchedule):
    """How many rows of S stay, and when the others go; runs take it from `compress`."""

    # Share of the rows of S that stays,
    target: float = Field(default=0.1, ge=0, le=1)
    # in every matrix, or of all S together by what rows are worth.
    threshold: Literal["layer", "global"] = "global"
    # See `CompressConfig.multiple`.
    multiple: int = Field(default=1, gt=0)


class RecoverConfig(Settings):
    """Which values are trained, on how much text, and how fast."""

    # paper: loss and optimiser of MC-SMoE. long: what brought most in thousands of steps. Neither
    # changes what is given beside it.
    preset: Literal["paper", "long"] | None = None
    # router: router rows alone. experts: the routed experts. full: everything.
    mode: Literal["router", "experts", "full"] = "experts"
    # With mode=experts: the routers as well.
    router: bool = False
    # None: the text that is observed (`calibrate.data`).
    data: CorpusConfig | None = None
    # Updates.
    steps: int = Field(default=1000, gt=0)
    # Blocks of text per update, on all ranks together.
    batch: int = Field(default=16, gt=0)
    # Blocks that pass the model at once, on one rank.
    micro_batch: int = Field(default=8, gt=0)
    # Whether layers keep what enters them alone, and pass again for their gradients: less memory, a
    # third more work. auto: with zero_stage 3, where a pass would keep all gathered layers.
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    seed: int = Field(default=0, ge=0)
    # Weight of the distillation; 0: no teacher is asked.
    alpha: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    # mean: both terms are means over tokens, T^2 in the second. paper: positions of a sequence are
    # added up in the second, and no T^2.
    scaling: Literal["mean", "paper"] = "mean"
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    # Steps in which the rate rises.
    warmup: int = Field(default=20, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    # Largest norm of a step's gradient; None: any.
    clip: float | None = Field(default=1.0, gt=0)
    # With compress.importance=sensitivity: when rows of S go.
    prune: PruneSchedule | None = None
    teacher: TeacherConfig = TeacherConfig()
    # Steps between two checkpoints from which training goes on after a kill.
    checkpoint_every: int = Field(default=200, gt=0)
    # Processes that train together (DeepSpeed); 1 without a section `deepspeed`: plain torch.
    ranks: int = Field(default=1, gt=0)
    deepspeed: DeepSpeedConfig | None = None

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What decides the result up to rounding: not ranks, passes, states, nor where it runs."""
        free: dict[str, Any] = {"ranks": True, "micro_batch": True, "checkpoint_every": True}
        free |= {"deepspeed": True, "teacher": {"engine"}, "gradient_checkpointing": True}
        if self.prune is None:
            free["prune"] = True  # as in trainings that know no such section
        values: dict[str, Any] = self.model_dump(mode="json", exclude=free)
        return values | {"bf16": self.deepspeed is not None and self.deepspeed.bf16}

    @property
    def zero_stage(self) -> int | None:
        """How values are dealt out; None: they are not."""
        section = self.deepspeed or (DeepSpeedConfig() if self.ranks > 1 else None)
        return None if section is None else section.zero_stage

    @property
    def recomputes(self) -> bool:
        """Whether layers pass again for their gradients."""
        asked = self.gradient_checkpointing
        return self.zero_stage == 3 if asked == "auto" else asked

    @property
    def dealt_out(self) -> bool:
        """Whether DeepSpeed trains, on however many ranks."""
        return self.ranks > 1 or self.deepspeed is not None

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return _PRESETS.get(str(values.get("preset")), {}) | values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch % self.ranks:
            raise ValueError(f"batch={self.batch} cannot be dealt out evenly to {self.ranks} ranks")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} leaves nothing of {self.steps} steps")
        if self.prune is not None and sum(self.prune.phases(self.steps)) > self.steps:
            first, last = self.prune.phases(self.steps)
            raise ValueError(f"prune: {first} + {last} steps do not fit into {self.steps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in 0..1, got {self.betas}")
        if self.router and self.mode != "experts":
            raise ValueError("router=true belongs to mode=experts; the other modes include routers")
        return self
