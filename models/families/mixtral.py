"""Mixtral (arXiv 2401.04088): every layer is sparse; w1 gate, w3 up, w2 down."""

from models.families.base import Family

FAMILY = Family(
    model_type="mixtral",
    block="block_sparse_moe",
    expert_names={"gate": "w1", "up": "w3", "down": "w2"},
    intermediate_key="intermediate_size",
)
