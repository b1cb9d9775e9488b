"""MiniMax-01 (arXiv 2501.08313): Mixtral's blocks behind linear attention."""

from models.families.base import Family
from models.families.storage import W123

FAMILY = Family(
    model_type="minimax",
    block="block_sparse_moe",
    experts=W123,
    intermediate_key="intermediate_size",
)
