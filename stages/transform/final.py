"""What the model's last layer is polished towards: the original's distributions."""

from __future__ import annotations

from collections.abc import Sequence
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
    return Distributions(target.float(), stream, factor, opened(model).head)


def opened(folder: Path) -> StreamedModel:
    """Embeddings, final norm and head of the original, in fp32 on the CPU."""
    with torch.inference_mode(False):
        # Links were looked at when the run was prepared.
        return StreamedModel(Checkpoint.open(folder, allow_links=True), "float32", "cpu")
