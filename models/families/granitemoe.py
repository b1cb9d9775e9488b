"""Granite 3 MoE: all experts of a layer in two tensors, softmax over the chosen logits."""

from models.families.base import Family
from models.families.storage import Fused

FAMILY = Family(
    model_type="granitemoe",
    block="block_sparse_moe",
    memory_block="block_sparse_moe",
    router="router.layer.weight",
    memory_router="router.weight",
    experts=Fused("input_linear.weight", "output_linear.weight"),
    intermediate_key="intermediate_size",
)
