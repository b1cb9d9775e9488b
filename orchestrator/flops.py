"""Arithmetic of one token and the values that a model holds, from headers alone.

Products with weight matrices are all that is counted, 2 operations per weight that a token passes.
Attention scores grow with the text and are the same before and after, so they are left out; so are
norms, activations and convolutions. In an encoder-decoder "a token" is one of the source and one
of the target: each passes its own stack, and the decoder looks at the source's keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.moe import MoeCheckpoint
from stages.compress.config import CompressConfig
from stages.compress.layer import applies, shapes
from stages.export.formats.mapped import kept_expert
from stages.group.decision import LayerDecision


def per_token(
    moe: MoeCheckpoint,
    decisions: Sequence[LayerDecision] = (),
    compress: CompressConfig | None = None,
) -> int:
    """Floating-point operations of one token through all layers and the head.

    Args:
        decisions: of layers that are compressed; the others are as they were. Experts behind a map
            are counted as if all of a token's k were different, which is an upper bound.
        compress: how experts are computed as U V + S; rows of S that are gone cost nothing.
    """
    by_layer = {decision.layer: decision for decision in decisions}
    total = _dense(moe)
    for layer in moe.layers:
        total += moe.top_k * _expert_values(moe, layer, by_layer.get(layer), compress)
        total += moe.num_experts * moe.hidden_size
    return 2 * total


def parameters(
    moe: MoeCheckpoint,
    decisions: Sequence[LayerDecision] = (),
    compress: CompressConfig | None = None,
) -> int:
    """Values of a model whose merged experts are held once, behind routers that stay whole.

    Args: as of `per_token`; the positions of what is kept of S are no values.
    """
    by_layer = {decision.layer: decision for decision in decisions}
    total = moe.checkpoint.parameters
    for layer in moe.layers:
        decision = by_layer.get(layer)
        if decision is None:
            continue
        biases = sum(t.numel() for t in moe.meta_expert(layer).tensors().values() if t.dim() == 1)
        before = moe.num_experts * (biases + _expert_values(moe, layer, None, None))
        each = biases + _expert_values(moe, layer, decision, compress)
        total += len(decision.representatives) * each - before
    return total


def _expert_values(
    moe: MoeCheckpoint,
    layer: int,
    decision: LayerDecision | None,
    compress: CompressConfig | None,
) -> int:
    """Values of the matrices of one expert."""
    expert = moe.meta_expert(layer) if decision is None else kept_expert(moe, decision)
    if decision is not None and compress is not None and applies(compress, layer):
        return sum(each.values for each in shapes(expert, compress, layer).values())
    return sum(t.numel() for t in expert.tensors().values() if t.dim() == 2)


def attention(moe: MoeCheckpoint, length: int) -> int:
    """Operations of the attention scores of one token, and of the sums that they weigh.

    Every token looks at all `length` others, as in an encoder without a mask; the padding of a
    batch counts.

    Raises:
        KeyError: config.json has no plain heads (`num_heads`, or `num_attention_heads`).
    """
    config = moe.checkpoint.config
    if moe.family.encoder_decoder:
        width = int(config["num_heads"]) * int(config["d_kv"])
        modules = int(config["num_layers"]) + 2 * int(config["num_decoder_layers"])
    else:
        heads = int(config["num_attention_heads"])
        width = heads * int(config.get("head_dim") or moe.hidden_size // heads)
        modules = int(config["num_hidden_layers"])
    return 4 * width * modules * length


def _dense(moe: MoeCheckpoint) -> int:
    """Weights outside routed experts and routers; one matrix of vocabulary times hidden: the head.

    Looking a token up costs nothing, whether or not the table is also the head; nor does the table
    of relative positions of an encoder-decoder.
    """
    vocabulary = int(moe.checkpoint.config["vocab_size"])
    layers = {moe.family.layer_of(name) for name in moe.checkpoint.tensors}
    found = [
        moe.checkpoint.tensors[name].shape
        for layer in layers
        for name in moe.dense_names(layer)
        if not name.endswith("relative_attention_bias.weight")
    ]
    matrices = [shape for shape in found if len(shape) == 2 and shape[0] != vocabulary]
    return sum(rows * columns for rows, columns in matrices) + vocabulary * moe.hidden_size
