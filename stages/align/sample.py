"""What the neurons of a layer's experts do on sampled tokens, for alignment by activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.expert import Expert
from models.expert_function import activation, activations, check_function
from models.moe import MoeCheckpoint
from stages.align.config import AlignConfig
from stages.errors import StatisticsError
from stages.inputs.read import LayerInputs

# Expert -> [N, I] float32.
Seen = Callable[[Expert], Tensor]
# Tokens on which the known expert function is compared with the family's own.
_COMPARED = 16


def watched(
    moe: MoeCheckpoint,
    inputs: LayerInputs,
    config: AlignConfig,
    task: Mapping[str, float] | None,
) -> Seen:
    """`seen` by a checkpoint's own experts.

    Raises:
        StatisticsError: no token of the sample counts.
        CheckpointError: the family's experts compute a function that is not known here.
    """
    check_function(moe, inputs.layer, inputs.hidden[:_COMPARED])
    return seen(inputs, activation(moe.checkpoint.config), config.tokens, task)


def seen(
    inputs: LayerInputs,
    act: Callable[[Tensor | None, Tensor], Tensor],
    tokens: int,
    task: Mapping[str, float] | None = None,
) -> Seen:
    """Every expert on the same tokens, whichever experts they were routed to.

    Products over tokens count a token w times if its activations are scaled by sqrt(w).

    Args:
        tokens: at most so many, evenly spread over the sample.
        task: weights of domains; None: every token counts alike.

    Raises:
        StatisticsError: no token of the sample counts.
    """
    scale = None
    if task is not None:
        weights = inputs.weights(task)
        inputs, scale = inputs.only(weights > 0), weights[weights > 0].sqrt()
    if len(inputs) == 0:
        raise StatisticsError(
            f"layer {inputs.layer} has no sampled token to compare neurons on",
            "raise calibrate.sample.tokens, or set align.by=weights",
        )
    rows = evenly(len(inputs), tokens)
    x = inputs.hidden[rows].float()
    factor = None if scale is None else scale[rows, None]

    @torch.inference_mode()
    def watch(expert: Expert) -> Tensor:
        found = activations(expert.map(Tensor.float), x, act)
        return found if factor is None else found * factor

    return watch


def evenly(count: int, wanted: int) -> Tensor:
    """[min(count, wanted)] int64 ascending indices, evenly spaced in 0..count-1."""
    taken = min(count, wanted)
    return torch.arange(taken) * count // max(taken, 1)
