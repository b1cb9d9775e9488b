"""Qwen3-MoE (arXiv 2505.09388): many small experts, optional dense layers, no shared expert."""

from models.families.base import Family

FAMILY = Family(model_type="qwen3_moe")
