"""Makes MomentumSMoE known to transformers' Auto classes, without code beside the weights."""

from __future__ import annotations


def register() -> None:
    """May be called repeatedly; importing this module registers nothing and loads no torch."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from models.momentum.configuration_momentum import MomentumConfig
    from models.momentum.modeling_momentum import MomentumForCausalLM, MomentumModel

    AutoConfig.register(MomentumConfig.model_type, MomentumConfig, exist_ok=True)
    AutoModel.register(MomentumConfig, MomentumModel, exist_ok=True)
    AutoModelForCausalLM.register(MomentumConfig, MomentumForCausalLM, exist_ok=True)
