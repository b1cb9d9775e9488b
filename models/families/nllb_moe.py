"""NLLB-MoE (arXiv 2207.04672): encoder-decoder, top-2, experts of two matrices with biases."""

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
