"""Switch Transformers (arXiv 2101.03961): encoder-decoder, top-1, experts of two matrices."""

from models.families.base import Family, RouterTensor, Stack
from models.families.storage import Separate

FAMILY = Family(
    model_type="switch_transformers",
    router="router.classifier.weight",
    router_biases=(RouterTensor("router.classifier.bias"),),
    experts=Separate({"up": "wi.weight", "down": "wo.weight"}, "experts.expert_{expert}.{tensor}"),
    memory_experts=None,
    stacks=(
        Stack("encoder.block", "num_layers", block="layer.1.mlp"),
        Stack("decoder.block", "num_decoder_layers", block="layer.2.mlp"),
    ),
    hidden_key="d_model",
    intermediate_key="d_ff",
    fixed_top_k=1,
    encoder_decoder=True,
)
