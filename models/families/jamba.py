"""Jamba (arXiv 2403.19887): every other layer is sparse, most layers are Mamba."""

from models.families.base import Family

FAMILY = Family(
    model_type="jamba",
    block="feed_forward",
    memory_block="feed_forward",
    router="router.weight",
    intermediate_key="intermediate_size",
)
