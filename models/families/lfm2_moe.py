"""LFM2-MoE: sigmoid router, correction bias in the block, short convolutions between."""

from models.families.base import Family, RouterTensor
from models.families.storage import W123

FAMILY = Family(
    model_type="lfm2_moe",
    block="feed_forward",
    memory_block="feed_forward",
    router_biases=(RouterTensor("expert_bias"),),
    experts=W123,
)
