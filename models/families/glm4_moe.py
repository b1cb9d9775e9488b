"""GLM-4.5 (arXiv 2508.06471): the router of DeepSeek-V3, one group by default."""

from models.families.base import Family, RouterTensor

FAMILY = Family(
    model_type="glm4_moe",
    router_biases=(RouterTensor("gate.e_score_correction_bias"),),
    router_groups_key="n_group",
    fewest_per_router_group=2,
)
