"""Qwen2-MoE: a shared expert beside the routed ones, optional dense layers."""

from models.families.base import Family

FAMILY = Family(model_type="qwen2_moe")
