"""OLMoE (arXiv 2409.02060): 64 experts, top-8, gate weights are not renormalised."""

from models.families.base import Family

FAMILY = Family(model_type="olmoe", intermediate_key="intermediate_size")
