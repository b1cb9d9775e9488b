"""What the neurons of a layer's experts do on sampled tokens: what alignment by activations reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class AlignSample:
    """Where a layer's sampled inputs lie, and which domains of them count."""

    inputs: Path
    digest: str
    task: tuple[tuple[str, float], ...] | None = None

    def open(self, moe: MoeCheckpoint, layer: int, config: AlignConfig) -> Seen:
        """Reads the sample.

        Raises:
            StatisticsError: it cannot be read.
            CheckpointError: the family's experts compute a function that is not known here.
        """
        inputs = LayerInputs.read(self.inputs)
        check_function(moe, layer, inputs.hidden[:_COMPARED])
        task = None if self.task is None else dict(self.task)
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
