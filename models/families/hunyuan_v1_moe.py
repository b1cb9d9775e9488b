"""Hunyuan-A13B: softmax router in fp32, a shared MLP beside the experts."""

from models.families.base import Family

FAMILY = Family(
    model_type="hunyuan_v1_moe",
    router="gate.wg.weight",
    intermediate_key="intermediate_size",
    top_k_key="moe_topk",
)
