"""ERNIE 4.5: softmax router whose choice is corrected by a bias `[1, E]`."""

from models.families.base import Family, RouterTensor

_BIAS = "moe_statics.e_score_correction_bias"

FAMILY = Family(
    model_type="ernie4_5_moe",
    router_biases=(RouterTensor(_BIAS, memory=f"gate.{_BIAS}", axis=1),),
    top_k_key="moe_k",
)
