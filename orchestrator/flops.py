"""Arithmetic of one token, from headers alone: 2 operations per weight that it passes.

Products with weight matrices are all that is counted. Attention scores grow with the text and are
the same before and after, so they are left out; so are norms, activations and convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.moe import MoeCheckpoint
from stages.group.decision import LayerDecision


def per_token(moe: MoeCheckpoint, decisions: Sequence[LayerDecision] = ()) -> int:
    """Floating-point operations of one token through all layers and the head.

    Args:
        decisions: of layers that are compressed; the others are as they were. Experts behind a map
            are counted as if all of a token's k were different, which is an upper bound.
    """
    widths = {decision.layer: decision.width for decision in decisions}
    total = _dense(moe)
    for layer in moe.layers:
        expert = moe.meta_expert(layer)
        matrices = [t.numel() for t in expert.tensors().values() if t.dim() == 2]
        width = widths.get(layer) or expert.neurons
        total += moe.top_k * sum(matrices) * width // expert.neurons
        total += moe.num_experts * moe.hidden_size
    return 2 * total


def _dense(moe: MoeCheckpoint) -> int:
    """Weights outside routed experts and routers; one matrix of vocabulary times hidden: the head.

    Looking a token up costs nothing, whether or not the table is also the head.
    """
    vocabulary = int(moe.checkpoint.config["vocab_size"])
    layers = {moe.family.layer_of(name) for name in moe.checkpoint.tensors}
    shapes = [
        moe.checkpoint.tensors[name].shape for layer in layers for name in moe.dense_names(layer)
    ]
    matrices = [shape for shape in shapes if len(shape) == 2 and shape[0] != vocabulary]
    return sum(rows * columns for rows, columns in matrices) + vocabulary * moe.hidden_size
