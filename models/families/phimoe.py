"""Phi-3.5-MoE (arXiv 2404.14219): Mixtral's names, top-2 by SparseMixer."""

from models.families.base import Family
from models.families.storage import W123

FAMILY = Family(
    model_type="phimoe",
    block="block_sparse_moe",
    memory_router="router.weight",
    experts=W123,
    intermediate_key="intermediate_size",
)
