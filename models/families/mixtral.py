"""Mixtral (arXiv 2401.04088): every layer is sparse; w1 gate, w3 up, w2 down."""

from models.families.base import Family
from models.families.storage import W123

FAMILY = Family(
    model_type="mixtral",
    block="block_sparse_moe",
    experts=W123,
    intermediate_key="intermediate_size",
)
