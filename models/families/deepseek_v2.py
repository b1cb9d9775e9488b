"""DeepSeek-V2 (arXiv 2405.04434): dense first layers, shared experts, groups of experts."""

from models.families.base import Family

FAMILY = Family(model_type="deepseek_v2", router_groups_key="n_group")
