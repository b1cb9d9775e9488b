"""What the model's last layer is polished towards: the original's distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.streaming.model import StreamedModel
from stages.carry.read import behind
from stages.refit.config import PolishConfig
from stages.refit.goal import Distributions


def last_layer(
    config: PolishConfig, model: Path, layer: int, parts: Sequence[Path], target: Tensor
) -> Distributions | None:
    """None unless the config asks for it and this is the model's last layer, refitted alone.

    Args:
        model: folder of the original.
        parts: what was carried to the layer, with `target` [N, H] among it.

    Raises:
        StatisticsError: what was carried cannot be read.
    """
    if not config.steps or config.last_layer != "logits":
        return None
    found = behind(layer, parts)
    if found is None:
        return None
    stream, factor = found
    return Distributions(target.float(), stream, factor, Head(model))


@dataclass(frozen=True)
class Head:
    """[n, H] residual stream -> [n, V] logits, by final norm and head of a checkpoint in fp32 on
    the CPU, which are read when they are first needed."""

    folder: Path

    def __call__(self, stream: Tensor) -> Tensor:
        """A gradient may pass through."""
        return self._model.head(stream)

    @cached_property
    def _model(self) -> StreamedModel:
        with torch.inference_mode(False):
            # Links were looked at when the run was prepared.
            return StreamedModel(Checkpoint.open(self.folder, allow_links=True), "float32", "cpu")
