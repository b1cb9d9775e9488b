"""NLLB-MoE (arXiv 2207.04672): encoder-decoder, top-2, experts of two matrices with biases.

transformers 5.23.0 takes the router's mask of zeros and ones for expert ids: whatever is chosen,
experts 0 and 1 alone run. What is merged here is right; what that model then computes is not.
"""

from models.families.base import Family, RouterTensor, Stack
from models.families.storage import Separate

_TENSORS = {
    "up": "fc1.weight",
    "up_bias": "fc1.bias",
    "down": "fc2.weight",
    "down_bias": "fc2.bias",
}

FAMILY = Family(
    model_type="nllb-moe",
    router="router.classifier.weight",
    router_biases=(RouterTensor("router.classifier.bias"),),
    experts=Separate(_TENSORS, "experts.expert_{expert}.{tensor}"),
    memory_experts=None,
    stacks=(
        Stack("model.encoder.layers", "encoder_layers", "ffn", "encoder_ffn_dim"),
        Stack("model.decoder.layers", "decoder_layers", "ffn", "decoder_ffn_dim"),
    ),
    hidden_key="d_model",
    fixed_top_k=2,
    encoder_decoder=True,
)
