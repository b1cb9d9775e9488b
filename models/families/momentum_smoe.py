"""MomentumSMoE (arXiv 2410.14574): Mixtral's tensors, momentum from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.base import Family
from models.families.storage import W123
from models.momentum.files import AUTO_MAP, CODE


def _behind_experts(config: Mapping[str, Any]) -> str | None:
    """config.json names only what is not the default."""
    kind = config.get("momentum_kind", "heavy_ball")
    if config.get("block_style", "pre_ln") == "post_ln":
        return "block_style=post_ln has two norms behind the momentum step"
    if kind in ("adam", "sign"):
        return f"momentum_kind={kind} divides each component by its size"
    return None


def _error_gains(config: Mapping[str, Any]) -> Mapping[int, float]:
    from models.momentum.configuration_momentum import MomentumConfig

    gains: Mapping[int, float] = MomentumConfig.from_dict(dict(config)).error_gains
    return gains


FAMILY = Family(
    model_type="momentum_smoe",
    block="block_sparse_moe",
    experts=W123,
    intermediate_key="intermediate_size",
    states=3,  # the hidden state, and momentum with real and imaginary part
    behind_experts=_behind_experts,
    error_gains=_error_gains,
    code=CODE,
    auto_map=AUTO_MAP,
)
