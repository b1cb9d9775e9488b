"""Config of the group stage: a method and a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from stages.errors import BudgetError
from stages.settings import Settings

VERSION = 1

Need = Literal["subsample", "router", "weights", "inputs", "probe", "gain"]
WeighLayers = Literal["none", "gain"]


class Budget(Settings):
    """How much to keep; exactly one of the three."""

    # Mean number of experts per layer.
    experts_per_layer: float | None = Field(default=None, gt=0)
    # Share of the experts.
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    # Size of all weight files of the output.
    target_bytes: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of experts_per_layer, keep_ratio, target_bytes;"
                f" got {', '.join(given) or 'none'}"
            )
        return self


class _Method(Settings):
    # Beyond routing sums: "subsample" (all experts on sampled tokens), "router" rows, "weights",
    # "inputs" (what entered the layers, on sampled tokens).
    needs: ClassVar[tuple[Need, ...]] = ()

    budget: Budget = Budget(keep_ratio=0.5)
    # Layers that keep all their experts.
    skip_layers: tuple[int, ...] = ()
    # Experts with massive activations (arXiv 2507.23279) stay as they are, within the budget.
    protect_super_experts: bool = False
    # Weights of domains; those not named count nothing. None: the calibration text as it is.
    task: dict[str, Annotated[float, Field(ge=0)]] | None = None

    @field_validator("task")
    @classmethod
    def _some_weight(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and not any(value.values()):
            raise ValueError("task names no domain with a weight above 0")
        return value

    @property
    def prunes(self) -> bool:
        """Whether experts are dropped, not merged."""
        return False

    @property
    def may_drop(self) -> bool:
        """Whether some experts may be dropped, even if others are merged."""
        return self.prunes

    @property
    def narrows(self) -> bool:
        """Whether experts lose neurons."""
        return False

    @property
    def uneven(self) -> bool:
        """Whether layers may keep different numbers of experts."""
        return False

    @property
    def left(self) -> int | None:
        """Experts per layer that are asked for beside the budget; None: it says how many."""
        return None

    def skipped(self, layers: Sequence[int]) -> frozenset[int]:
        """Which of the model's MoE layers keep all their experts."""
        return frozenset(self.skip_layers)

    def check(self, experts: int, kept: int) -> None:
        """Refuses a layer of `experts` that is to keep `kept`, where that cannot be done.

        Raises:
            BudgetError: with both numbers.
        """


class _Pruning(_Method):
    @property
    def prunes(self) -> bool:
        return True


class Coalesce(_Method):
    """Narrower experts, all kept and refitted. Use when: best quality per byte, no recovery."""

    method: Literal["coalesce"] = "coalesce"
    needs = ("inputs",)
    # Experts keep a multiple of so many neurons; kernels like powers of two.
    multiple: int = Field(default=8, ge=1)
    # Neurons per layer. uniform: the same. probe, predicted: those that cost least together, by the
    # measured KL of every layer alone, or by predicted errors; export.format=mapped holds them.
    divide: Literal["uniform", "probe", "predicted"] = "uniform"
    # Experts of a layer that stay: those that its output would miss least go, by exact sums of the
    # sample, and the budget makes the others so much wider. None: all. Native format.
    experts: int | None = Field(default=None, ge=1)
    # gain: with divide=predicted, costs times the square of what becomes of an error by the end of
    # the model. It differs between layers where they have momentum, and is 1 in other families.
    weigh_layers: WeighLayers = "none"

    @model_validator(mode="after")
    def _all_layers(self) -> Coalesce:
        if self.skip_layers:
            raise ValueError("coalesce gives all layers one width: skip_layers must be empty")
        if self.protect_super_experts:
            raise ValueError("coalesce narrows every expert: protect_super_experts has no meaning")
        if self.experts is not None and self.divide != "uniform":
            raise ValueError("experts goes with one width for all layers: set divide=uniform")
        if self.weigh_layers == "gain" and self.divide != "predicted":
            raise ValueError(
                "weigh_layers=gain weighs predicted errors: set divide=predicted (what probe"
                " measures at the end of the model holds the gain already)"
            )
        return self

    @property
    def narrows(self) -> bool:
        return True

    @property
    def may_drop(self) -> bool:
        """Where fewer experts are asked for."""
        return self.experts is not None

    @property
    def uneven(self) -> bool:
        return self.divide != "uniform"

    @property
    def left(self) -> int | None:
        return self.experts

    def check(self, experts: int, kept: int) -> None:
        """No more can stay than there are."""
        if kept > experts:
            raise BudgetError(
                f"group.experts={kept}: a layer has {experts}", f"set it to {experts} or less"
            )


class McSmoe(_Method):
    """MC-SMoE (arXiv 2310.01334). Use when: the paper's method, or experts that are redundant."""

    method: Literal["mc_smoe"] = "mc_smoe"
    # safe: the budget is exact. paper: global scope with the published threshold, which keeps
    # fewer experts than asked for where frequencies are tied.
    preset: Literal["safe", "paper"] = "safe"
    # global: the paper's adaptive number per layer. uniform: the same number everywhere, safer on
    # balanced models, and the only one that the native format can hold.
    scope: Literal["global", "uniform"] = "uniform"
    min_per_layer: int = Field(default=1, ge=1)
    # gain: with scope=global, frequencies times what becomes of an error by the end of the model
    # (momentum over depth makes it larger in early layers; 1 in other families).
    weigh_layers: WeighLayers = "none"

    @model_validator(mode="before")
    @classmethod
    def _paper_is_global(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("preset") == "paper":
            return {"scope": "global"} | dict(values)
        return values

    @model_validator(mode="after")
    def _paper_as_printed(self) -> McSmoe:
        if self.preset == "paper" and (self.scope != "global" or self.min_per_layer != 1):
            raise ValueError("preset=paper has scope=global and min_per_layer=1")
        if self.weigh_layers == "gain" and (self.scope, self.preset) != ("global", "safe"):
            raise ValueError(
                "weigh_layers=gain divides one budget between layers: set scope=global and"
                " preset=safe"
            )
        return self

    @property
    def uneven(self) -> bool:
        return self.scope == "global"


class Uncurl(_Method):
    """UNCURL (arXiv 2409.01483). Use when: one task, recovery training follows, equal layers."""

    method: Literal["uncurl"] = "uncurl"
    # paper: the published protocol and nothing else, with the diagonal that algorithm 1 prints. It
    # also asks for a router that is drawn anew (export.router=reinit), so that the output is of no
    # use before it is trained.
    preset: Literal["paper"] | None = None
    # spectral: the method. frequency_merge, frequency_prune: the paper's baselines.
    grouping: Literal["spectral", "frequency_merge", "frequency_prune"] = "spectral"
    # token: logits minus their mean over the experts of a token, which no softmax can see.
    center_logits: Literal["none", "token"] = "none"
    # As in the spectral clustering that the paper cites. Its own algorithm has ones there, and only
    # with ones were copies of experts always found (docs/uncurl.md).
    zero_diagonal: bool = False
    # The first MoE layer: as the others, by frequency_merge, or left as it is.
    first_layer: Literal["cluster", "frequency", "skip"] = "cluster"
    seed: int = Field(default=0, ge=0)
    # Restarts of k-means.
    n_init: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _paper_as_printed(self) -> Uncurl:
        as_printed = self.grouping == "spectral" and self.center_logits == "none"
        if self.preset == "paper" and not (as_printed and not self.protect_super_experts):
            raise ValueError(
                "preset=paper has grouping=spectral, center_logits=none and no protected experts"
            )
        return self

    @property
    def prunes(self) -> bool:
        return self.grouping == "frequency_prune"

    def skipped(self, layers: Sequence[int]) -> frozenset[int]:
        """`skip_layers`, and the first layer if it is to be skipped."""
        first = {min(layers)} if self.first_layer == "skip" and layers else set()
        return frozenset(self.skip_layers) | first


class HcSmoe(_Method):
    """HC-SMoE (arXiv 2410.08589). Use when: merging, and calibration text may not fit the use."""

    method: Literal["hc_smoe"] = "hc_smoe"
    needs = ("subsample",)
    linkage: Literal["average", "single", "complete"] = "average"


class Ream(_Method):
    """REAM (arXiv 2604.04356). Use when: many experts, a quarter goes, generation matters."""

    method: Literal["ream"] = "ream"
    needs = ("subsample",)
    # Members of a group with its centre. None: E / K rounded up, at least 2.
    group_size: int | None = Field(default=None, ge=1)

    def check(self, experts: int, kept: int) -> None:
        """Groups must hold all experts."""
        if self.group_size is not None and kept * self.group_size < experts:
            raise BudgetError(
                f"{kept} groups of {self.group_size} cannot hold {experts} experts",
                f"set group.group_size to {-(-experts // kept)} or more, or raise the budget",
            )


class MergeMoe(_Method):
    """MergeMoE's groups (arXiv 2510.14436). Use when: experts' input matrices are near copies."""

    method: Literal["merge_moe"] = "merge_moe"
    needs = ("weights",)


class Frequency(_Pruning):
    """Keeps the most used experts, drops the others. Use when: a baseline is wanted."""

    method: Literal["frequency"] = "frequency"


class Reap(_Pruning):
    """REAP (arXiv 2510.13999): drops the least mean g|f|. Use when: one-shot, no recovery."""

    method: Literal["reap"] = "reap"


class Ean(_Pruning):
    """Expert activation norm, sum of |f| (in arXiv 2510.13999). Use when: gates mislead."""

    method: Literal["ean"] = "ean"
    # Divide by the tokens of the expert.
    mean: bool = False


class Msan(_Pruning):
    """Mean squared activation norm (arXiv 2606.15716). Use when: no task, routing is balanced."""

    method: Literal["msan"] = "msan"
    # False: the mean of |f| (MAN), not of its square.
    squared: bool = True


class Stun(_Method):
    """STUN's expert step (arXiv 2409.06211). Use when: routers are all there is to go by."""

    method: Literal["stun"] = "stun"
    needs = ("router",)
    # What co-activation weighs against the distance of router rows; both have mean 1.
    coactivation: float = Field(default=1.0, ge=0)
    # What becomes of the experts beside the one nearest to the centre of their cluster.
    others: Literal["drop", "merge"] = "drop"

    @property
    def prunes(self) -> bool:
        return self.others == "drop"


class Naee(_Pruning):
    """NAEE (arXiv 2402.14800), every subset tried. Use when: few experts per layer (Mixtral)."""

    method: Literal["naee"] = "naee"
    needs = ("subsample",)
    # More subsets than this are refused; 16 choose 8 is 12,870.
    max_subsets: int = Field(default=20_000, ge=1)

    def check(self, experts: int, kept: int) -> None:
        """All subsets must be tried."""
        if (subsets := comb(experts, kept)) > self.max_subsets:
            raise BudgetError(
                f"{kept} of {experts} experts can be chosen in {subsets:,} ways, more than"
                f" group.max_subsets={self.max_subsets:,}",
                "use another method for this many experts, or raise group.max_subsets",
            )


class Mixed(_Method):
    """Keeps, merges or drops by exact sums. Use when: some experts have twins, others no use."""

    method: Literal["mixed"] = "mixed"
    needs = ("subsample",)
    # Which steps may be taken.
    merge: bool = True
    drop: bool = True
    # Members of a group; None: any number. The sums are exact for two.
    group_size: int | None = Field(default=2, ge=2)

    @model_validator(mode="after")
    def _some_step(self) -> Mixed:
        if not (self.merge or self.drop):
            raise ValueError("merge and drop are both false: no expert could go")
        return self

    @property
    def prunes(self) -> bool:
        return not self.merge

    @property
    def may_drop(self) -> bool:
        """Unless `drop` is off."""
        return self.drop

    def check(self, experts: int, kept: int) -> None:
        """Groups must hold all experts where none may be dropped."""
        if not self.drop and self.group_size is not None and kept * self.group_size < experts:
            raise BudgetError(
                f"{kept} groups of {self.group_size} cannot hold {experts} experts, and"
                " group.drop=false",
                f"set group.group_size to {-(-experts // kept)} or more, or group.drop=true",
            )


class Random(_Method):
    """Chance, by a seed. Use when: a method has to show that it finds anything."""

    method: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0)
    others: Literal["drop", "merge"] = "drop"

    @property
    def prunes(self) -> bool:
        return self.others == "drop"


AnyMethod = (
    Coalesce
    | McSmoe
    | Uncurl
    | HcSmoe
    | Ream
    | MergeMoe
    | Frequency
    | Reap
    | Ean
    | Msan
    | Stun
    | Naee
    | Mixed
    | Random
)
GroupConfig = Annotated[AnyMethod, Field(discriminator="method")]
METHODS: dict[str, type[AnyMethod]] = {
    made.model_fields["method"].default: made for made in get_args(AnyMethod)
}
