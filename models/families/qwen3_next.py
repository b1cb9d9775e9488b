"""Qwen3-Next: 512 small experts and a gated shared one, three of four layers linear attention."""

from models.families.base import Family

FAMILY = Family(model_type="qwen3_next")
