"""AFMoE (Trinity): sigmoid router, correction bias in the block, shared experts."""

from models.families.base import Family, RouterTensor

FAMILY = Family(
    model_type="afmoe",
    router="router.gate.weight",
    router_biases=(RouterTensor("expert_bias"),),
    behind_experts=lambda _: "a norm stands behind the experts",
)
