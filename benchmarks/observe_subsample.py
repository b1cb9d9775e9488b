"""What the sums of all experts on the sample cost, in units of observing the same tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def subsample_seconds(model: Path, folder: Path, tokens: int) -> float:
    """Seconds of the processor that all layers' jobs take for `tokens` sampled tokens."""
    import torch

    from models.moe import MoeCheckpoint
    from stages.subsample.evaluate import layer_sums

    torch.set_num_threads(1)
    moe = MoeCheckpoint.open(model)
    start = time.process_time()
    for layer in moe.layers:
        layer_sums(moe, _inputs(moe, layer, tokens), folder / f"layer-{layer}.arrow")
    return time.process_time() - start


def _inputs(moe: Any, layer: int, tokens: int) -> Any:
    """Random inputs with random routing; what they are does not change the work."""
    import torch

    from stages.inputs.read import LayerInputs

    generator = torch.Generator().manual_seed(layer)
    logits = torch.randn(tokens, moe.num_experts, generator=generator)
    gates, ids = logits.softmax(dim=-1).topk(moe.top_k)
    places = torch.arange(tokens)
    return LayerInputs(
        layer=layer,
        hidden=torch.randn(tokens, moe.hidden_size, generator=generator),
        ids=ids,
        gates=gates,
        logits=logits,
        block=places,
        position=places.int(),
        domain=torch.zeros(tokens, dtype=torch.int32),
        domains=("any",),
        seed=0,
        inputs={},
    )
