"""The per-layer job: read a layer, merge its groups, narrow, refit, decompose, write its file.

Nothing else is needed than the layer's own tensors, its rows of the decision table and, for a
refit, its input sample, so layers run anywhere, in any order, and the memory is that of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.atomic import staged
from models.errors import CheckpointError
from models.expert import Expert
from models.expert_function import check_function
from models.factored import AnyExpert, FactoredExpert
from models.moe import MoeCheckpoint
from models.routing import route
from stages.align.config import VERSION as ALIGN_VERSION
from stages.align.config import AlignConfig
from stages.align.sample import watched
from stages.carry.read import carried
from stages.compress.config import CompressConfig
from stages.compress.layer import applies, with_all_rows
from stages.compress.unit import Sample, decompose, fingerprint
from stages.errors import StatisticsError
from stages.export.config import VERSION as EXPORT_VERSION
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.export.layout import FileLayout
from stages.export.router import settled_routers
from stages.group.decision import LayerDecision
from stages.inputs.read import LayerInputs
from stages.merge.config import VERSION as MERGE_VERSION
from stages.merge.config import MergeConfig
from stages.merge.groups import merge_groups, pool_groups
from stages.narrow.config import VERSION as NARROW_VERSION
from stages.narrow.config import NarrowConfig
from stages.refit.config import VERSION as REFIT_VERSION
from stages.refit.config import RefitConfig
from stages.refit.layer import Reduction, reduce_experts
from stages.transform.final import last_layer
from stages.unit import Fingerprint, OneFile

# Tokens on which the known expert function is compared with the family's own.
_COMPARED = 16


@dataclass(frozen=True)
class TransformUnit(OneFile):
    """Writes one output file; `decision` is None for a file without merged experts."""

    moe: MoeCheckpoint
    layer: int | None
    decision: LayerDecision | None
    align: AlignConfig
    merge: MergeConfig
    export: ExportConfig
    output: Path
    model: str  # fingerprint of the model
    variant: str = "compressed"
    narrow: NarrowConfig = field(default_factory=NarrowConfig)
    refit: RefitConfig = field(default_factory=lambda: RefitConfig(enabled=False))
    # Sample of what enters the layer, and its digest; None: there is none, and nothing is refitted.
    inputs: tuple[Path, str] | None = None
    # What was carried to this layer, and a digest of all that it depends on; None: the layer is
    # fitted to its own outputs on its own inputs.
    carried: tuple[tuple[Path, ...], str] | None = None
    # Weights of domains in the sample; None: every token counts alike.
    task: tuple[tuple[str, float], ...] | None = None
    # Where a decomposed layer is written once more, with all rows of S; None: nowhere.
    start: Path | None = None

    @property
    def name(self) -> str:
        """`compressed/layer-00003.safetensors`."""
        return f"{self.variant}/{self.output.name}"

    @property
    def outputs(self) -> Sequence[Path]:
        """The file, and the one to start a training from."""
        return (self.output,) if self.start is None else (self.output, self.start)

    @property
    def near(self) -> str | None:
        """The weight file that it reads most of."""
        return self.moe.home(self.layer)

    @property
    def fingerprint(self) -> Fingerprint:
        """Model, decision of this layer, and the config that shapes the tensors."""
        decision = self.decision
        return {
            "code": f"align-{ALIGN_VERSION} merge-{MERGE_VERSION} export-{EXPORT_VERSION}",
            "model": self.model,
            "config": {
                "align": self.align.model_dump(mode="json"),
                "merge": self.merge.model_dump(mode="json"),
                "export": self.export.model_dump(mode="json", exclude={"compare_limit_bytes"}),
            },
            "decision": None
            if decision is None
            else [list(decision.group), list(decision.representatives), list(decision.weight)],
        } | (self._reduction | self._compression)

    @property
    def merges(self) -> bool:
        """Whether a group of this layer has several members."""
        decision = self.decision
        return decision is not None and any(len(each) > 1 for each in decision.members)

    @property
    def reads_sample(self) -> bool:
        """Whether merging itself looks at the layer's sample: alignment, neurons, router rows."""
        watches = self.align.watches or self.merge.by == "neurons"
        return self.merges and (watches or self.export.router == "least_squares")

    @property
    def _sample(self) -> Fingerprint:
        """What merging by the sample depends on beside the rest."""
        if not self.reads_sample:
            return {}
        digest = self.inputs and self.inputs[1]
        found: Fingerprint = {"sample": [digest, self.task and dict(self.task)]}
        if self.merge.by == "neurons":
            found |= {"pool": [f"narrow-{NARROW_VERSION}", self.narrow.ridge]}
        return found

    @property
    def needs_inputs(self) -> bool:
        """Whether narrowing or a refit is to be done in this layer."""
        decision = self.decision
        if decision is None:
            return False
        fewer = len(decision.representatives) < self.moe.num_experts
        return decision.width is not None or (self.refit.enabled is True and fewer)

    @property
    def refitted(self) -> bool:
        """Whether down projections are to be solved again in this layer."""
        return self.needs_inputs and self.refit.enabled is True

    @property
    def decomposes(self) -> CompressConfig | None:
        """How this layer's experts are decomposed; None: they are not."""
        config, decision = self.export.compress, self.decision
        return None if decision is None or not applies(config, decision.layer) else config

    @property
    def _compression(self) -> Fingerprint:
        config = self.decomposes
        if config is None:
            return {}
        reads = config.needs_inputs or self.refit.enabled is True
        digest = self.inputs[1] if reads and self.inputs is not None else None
        return fingerprint(config, digest, self.refit)

    @property
    def _refit(self) -> Fingerprint:
        """How it is refitted says nothing of what is not."""
        on = self.refit.enabled is True
        return self.refit.model_dump(mode="json") if on else {"enabled": False}

    @property
    def _reduction(self) -> Fingerprint:
        """What a narrowed or refitted layer depends on beside the rest."""
        if not self.needs_inputs or self.decision is None:
            return self._sample
        return self._sample | {
            "reduction": {
                "code": f"narrow-{NARROW_VERSION} refit-{REFIT_VERSION}",
                "width": self.decision.width,
                "narrow": self.narrow.model_dump(mode="json"),
                "refit": self._refit,
                "inputs": None if self.inputs is None else self.inputs[1],
                "carried": None if self.carried is None else self.carried[1],
                "task": None if self.task is None else dict(self.task),
            }
        }


def plan(
    moe: MoeCheckpoint,
    decisions: Sequence[LayerDecision],
    layouts: Sequence[FileLayout],
    *,
    align: AlignConfig,
    merge: MergeConfig,
    export: ExportConfig,
    folder: Path,
    model: str,
    variant: str = "compressed",
    narrow: NarrowConfig | None = None,
    refit: RefitConfig | None = None,
    inputs: Mapping[int, tuple[Path, str]] | None = None,
    task: Mapping[str, float] | None = None,
) -> list[TransformUnit]:
    """One unit per output file.

    Args:
        refit: None leaves reduced experts as they are.
        inputs: layer -> its sampled inputs and their digest.
        task: weights of domains in narrowing and refit.
    """
    by_layer = {decision.layer: decision for decision in decisions}
    return [
        TransformUnit(
            moe=moe,
            layer=layout.layer,
            decision=None if layout.layer is None else by_layer.get(layout.layer),
            align=align,
            merge=merge,
            export=export,
            output=folder / file_name(layout.layer),
            model=model,
            variant=variant,
            narrow=narrow or NarrowConfig(),
            refit=refit or RefitConfig(enabled=False),
            inputs=None if layout.layer is None else (inputs or {}).get(layout.layer),
            task=None if task is None else tuple(sorted(task.items())),
        )
        for layout in layouts
    ]


def file_name(layer: int | None) -> str:
    """`layer-00003.safetensors`, or `rest.safetensors` for what lies outside all layers."""
    return "rest.safetensors" if layer is None else f"layer-{layer:05d}.safetensors"


def run_one(unit: TransformUnit) -> dict[str, Any]:
    """Writes the finished tensors of one file.

    Raises:
        CheckpointError: a merged tensor is not finite.
    """
    form = FORMATS[unit.export.format]
    names = unit.moe.dense_names(unit.layer)
    dense = unit.moe.checkpoint.read(names)
    tensors = {form.dense_name(unit.moe, name): tensor for name, tensor in dense.items()}
    result: dict[str, Any] = {"tensors": len(tensors)}
    if unit.decision is not None:
        merged, routers, facts = merge_layer(unit, unit.decision)
        if unit.needs_inputs:
            reduction = reduce_layer(unit, unit.decision, merged, routers)
            merged = reduction.experts
            result |= reduction.facts
        experts, factored = decomposed(unit, unit.decision, merged, routers)
        if unit.start is not None:
            pairs = zip(merged, experts, strict=True)
            every = [with_all_rows(e, m) for e, m in pairs if isinstance(m, FactoredExpert)]
            more = form.layer_tensors(unit.moe, unit.decision, every, routers, unit.export)
            _write(unit, unit.start, tensors | more)
        tensors |= form.layer_tensors(unit.moe, unit.decision, experts, routers, unit.export)
        result |= factored | {"experts": len(merged)} | facts
    _write(unit, unit.output, tensors)
    return result | {"tensors": len(tensors), "bytes": unit.output.stat().st_size}


def _write(unit: TransformUnit, output: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    _refuse_non_finite(unit, tensors)
    with staged(output) as path:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata={"format": "pt"})


def merge_layer(
    unit: TransformUnit, decision: LayerDecision
) -> tuple[list[Expert], dict[str, Tensor], dict[str, Any]]:
    """Merged experts, the router's tensors with the rows that groups get, and facts of both."""
    task = None if unit.task is None else dict(unit.task)
    inputs = LayerInputs.read(unit.inputs[0]) if unit.reads_sample and unit.inputs else None
    if inputs is not None and unit.merge.by == "neurons":
        configs = unit.align, unit.merge, unit.narrow
        merged, distances = pool_groups(unit.moe, decision, *configs, inputs, task)
    else:
        watches = inputs is not None and unit.align.watches
        seen = watched(unit.moe, inputs, unit.align, task) if inputs and watches else None
        merged, distances = merge_groups(unit.moe, decision, unit.align, unit.merge, seen)
    routers = unit.moe.checkpoint.read(unit.moe.router_names(decision.layer))
    routers, facts = settled_routers(unit.export, unit.moe, decision, routers, inputs, task)
    return merged, routers, distances | facts


def reduce_layer(
    unit: TransformUnit,
    decision: LayerDecision,
    merged: list[Expert],
    routers: dict[str, Tensor],
) -> Reduction:
    """Narrows and refits the experts that are kept, routed as they will be.

    Raises: as `sampled`.
    """
    sample = sampled(unit, decision, merged, routers)
    return reduce_experts(
        unit.moe,
        merged,
        decision.width,
        sample.inputs,
        (sample.ids, sample.gates),
        unit.narrow,
        unit.refit,
        sample.target,
        sample.final,
    )


def decomposed(
    unit: TransformUnit,
    decision: LayerDecision,
    merged: list[Expert],
    routers: dict[str, Tensor],
) -> tuple[Sequence[AnyExpert], dict[str, Any]]:
    """The kept experts as U V + S where the config asks for it, and what that leaves out.

    Raises: as `sampled`.
    """
    config = unit.decomposes
    if config is None:
        return merged, {}
    reads = config.needs_inputs or unit.refit.enabled is True
    sample = sampled(unit, decision, merged, routers) if reads else None
    return decompose(unit.moe, merged, config, unit.refit, sample, decision.layer)


def sampled(
    unit: TransformUnit,
    decision: LayerDecision,
    merged: list[Expert],
    routers: dict[str, Tensor],
) -> Sample:
    """The layer's sampled inputs and where its reduced router sends them, weighed by the task.

    Raises:
        StatisticsError: there is no sample of what enters the layer.
        CheckpointError: the family's experts compute a function that is not known here.
    """
    if unit.inputs is None:
        raise StatisticsError(
            f"{unit.name} is to be fitted to what enters it, and its inputs were not sampled",
            "set calibrate.sample.tokens, or refit.enabled=false and a method that keeps the width",
        )
    inputs = LayerInputs.read(unit.inputs[0])
    target, final = None, None
    if unit.carried is not None:
        parts, polish, folder = unit.carried[0], unit.refit.polish, unit.moe.checkpoint.folder
        inputs, target = carried(inputs, parts)
        final = last_layer(polish, folder, decision.layer, parts, target)
    check_function(unit.moe, decision.layer, inputs.hidden[:_COMPARED])
    weights = None if unit.task is None else inputs.weights(dict(unit.task))
    if weights is not None:  # tokens of other domains count nothing
        counts = weights > 0
        target = None if target is None else target[counts]
        final = None if final is None else final.among(counts)
        inputs, weights = inputs.only(counts), weights[counts]
    ids, gates = _routing(unit, decision, merged, routers, inputs)
    if weights is not None:
        # Squares over a token count w times if its gates, here and in the target, are scaled.
        scale = weights.sqrt()[:, None]
        inputs, gates = replace(inputs, gates=inputs.gates * scale), gates * scale
        target = None if target is None else target * scale
        final = None if final is None else final.weighed(weights)
    return Sample(inputs, ids, gates, target, final)


def _routing(
    unit: TransformUnit,
    decision: LayerDecision,
    merged: list[Expert],
    routers: dict[str, Tensor],
    inputs: LayerInputs,
) -> tuple[Tensor, Tensor]:
    """ids [N, k] among the kept experts and gates [N, k], as the output's router will choose."""
    form = FORMATS[unit.export.format]
    fewer = len(merged) < unit.moe.num_experts
    if unit.export.format == "native" and (fewer or unit.export.router == "reinit"):
        tensors = form.layer_tensors(unit.moe, decision, merged, routers, unit.export)
        config = form.config_json(unit.moe, [decision], unit.export)
        cut = {name: tensors[name] for name in routers}
        return route(unit.moe, config, decision.layer, cut, inputs.hidden)
    group = torch.tensor([-1 if each is None else each for each in decision.group])
    return group[inputs.ids], inputs.gates


def _refuse_non_finite(unit: TransformUnit, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{unit.name}: {name} holds values that are NaN or infinite",
                "check the original tensors: `coalesce validate CONFIG --deep`",
            )
