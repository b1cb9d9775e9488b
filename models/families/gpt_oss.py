"""GPT-OSS (arXiv 2508.10925): fused, transposed, gate and up interleaved, biases everywhere."""

from models.families.base import Family, RouterTensor
from models.families.storage import Fused

_EXPERTS = Fused(transposed=True, interleaved=True, biases=True)

FAMILY = Family(
    model_type="gpt_oss",
    router="router.weight",
    router_biases=(RouterTensor("router.bias"),),
    experts=_EXPERTS,
    memory_experts=_EXPERTS,
    intermediate_key="intermediate_size",
    unsupported={"compress": "its experts have biases and a gate of their own"},
)
