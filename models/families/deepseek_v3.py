"""DeepSeek-V3 (arXiv 2412.19437): sigmoid router, correction bias, groups judged by two experts."""

from models.families.base import Family, RouterTensor

FAMILY = Family(
    model_type="deepseek_v3",
    router_biases=(RouterTensor("gate.e_score_correction_bias"),),
    router_groups_key="n_group",
    fewest_per_router_group=2,
)
