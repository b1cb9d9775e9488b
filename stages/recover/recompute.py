"""Layers that keep what enters them alone, and pass once more while gradients are made."""

from __future__ import annotations

from typing import Any

from models.errors import CheckpointError
from stages.recover.config import RecoverConfig
from stages.recover.ranks import Ranks


def recompute(model: Any, config: RecoverConfig, ranks: Ranks) -> None:
    """Turns on transformers' gradient checkpointing for a model in eval mode, and leaves it there.

    Transformers looks at the `training` of its checkpointing layers, which alone is set: attention
    and what else may drop values at random stays in eval mode.

    Raises:
        CheckpointError: it was asked for, and the family cannot do it.
    """
    if not config.recomputes:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        if config.gradient_checkpointing == "auto":
            return
        raise CheckpointError(
            f"{model.config.model_type} does not support gradient checkpointing",
            "set recover.gradient_checkpointing=false",
        )
    # With ZeRO 3 values come and go by hooks; only the reentrant kind takes a second pass whose
    # values are other tensors than those of the first.
    reentrant = ranks.group is not None and config.zero_stage == 3
    how = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    for layer in layers:
        layer.training = True
