"""MiniMax-M2: sigmoid router with a correction bias in the block."""

from models.families.base import Family, RouterTensor
from models.families.storage import W123

FAMILY = Family(
    model_type="minimax_m2",
    block="block_sparse_moe",
    router_biases=(RouterTensor("e_score_correction_bias"),),
    experts=W123,
    intermediate_key="intermediate_size",
)
