"""The part of a layer's job that decomposes its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.expert import Expert
from models.expert_function import activation
from models.factored import AnyExpert
from models.moe import MoeCheckpoint
from stages.compress.config import VERSION, CompressConfig
from stages.compress.layer import Seen, compress_layer, errors
from stages.compress.resolve import resolve
from stages.inputs.read import LayerInputs
from stages.refit.config import RefitConfig
from stages.refit.goal import Distributions
from stages.refit.layer import held_out, target_of
from stages.refit.usage import usage
from stages.unit import Fingerprint


@dataclass(frozen=True)
class Sample:
    """What entered the layer, and where the router of the output sends it."""

    inputs: LayerInputs
    ids: Tensor  # [N, k] among the kept experts; negative: gone
    gates: Tensor  # [N, k]
    # [N, H] what the experts are to add up to; None: what the original ones do on these inputs.
    target: Tensor | None = None
    # What the model's last layer is polished towards in place of that; None: that.
    final: Distributions | None = None


def decompose(
    moe: MoeCheckpoint,
    experts: Sequence[Expert],
    config: CompressConfig,
    refit: RefitConfig,
    sample: Sample | None,
    layer: int,
) -> tuple[Sequence[AnyExpert], dict[str, Any]]:
    """The experts of a layer as U V + S, and how much of them that leaves out.

    Args:
        sample: None where neither whitening, importance nor a refit reads it.
    """
    if sample is None:
        made = compress_layer(experts, config, layer=layer)
        return made, errors(experts, made)
    use = usage(sample.ids, sample.gates, len(experts))
    seen = Seen(sample.inputs.hidden.float(), use, activation(moe.checkpoint.config))
    made = compress_layer(experts, config, seen if config.needs_inputs else None, layer)
    facts = errors(experts, made)
    if refit.enabled is not True:
        return made, facts
    judges = held_out(sample.inputs, refit.held_out)
    target = target_of(moe, sample.inputs) if sample.target is None else sample.target
    made, solved = resolve(made, target, seen, judges, refit)
    return made, facts | solved


def fingerprint(config: CompressConfig, inputs: str | None, refit: RefitConfig) -> Fingerprint:
    """What a decomposed layer depends on beside its decision and the export config.

    Args:
        inputs: digest of the sample, if it is read.
    """
    found: dict[str, Any] = {"code": f"compress-{VERSION}", "inputs": inputs}
    if refit.enabled is True:
        found["refit"] = refit.model_dump(mode="json")
    return {"compress": found}
