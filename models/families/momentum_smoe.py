"""MomentumSMoE (arXiv 2410.14574): Mixtral's tensors, momentum from layer to layer."""

from models.families.base import Family
from models.families.storage import W123
from models.momentum.files import AUTO_MAP, CODE

FAMILY = Family(
    model_type="momentum_smoe",
    block="block_sparse_moe",
    experts=W123,
    intermediate_key="intermediate_size",
    states=3,  # the hidden state, and momentum with real and imaginary part
    code=CODE,
    auto_map=AUTO_MAP,
)
