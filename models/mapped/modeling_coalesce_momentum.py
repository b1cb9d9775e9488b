"""MomentumSMoE models with merged experts behind their original router.

Lies beside the weights with `modeling_coalesce.py` and the files of MomentumSMoE itself.
"""

from .modeling_coalesce import config_class, model_class

# mypy sees one of the two places alone, and which one depends on where it stands.
try:  # beside the weights
    from .modeling_momentum import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        MomentumConfig,
        MomentumForCausalLM,
    )
except ImportError:  # in Coalesce itself
    from models.momentum.configuration_momentum import MomentumConfig
    from models.momentum.modeling_momentum import MomentumForCausalLM

CoalesceMomentumConfig = config_class("momentum_smoe", MomentumConfig, __name__)
CoalesceMomentumForCausalLM = model_class(MomentumForCausalLM, CoalesceMomentumConfig, __name__)
