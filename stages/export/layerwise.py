"""The other half of the reload gate where the whole model does not fit: every value, by layer.

That plain transformers finds all names and shapes is what `gate.py` has shown by then; here the
values are read, one decoder layer at a time, and a few tokens pass through all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.blocks import find_block
from models.mapped.registration import register
from models.streaming.model import open_streamed

_TOKENS = (2, 24)  # batch, length of the trial input


@torch.inference_mode()
def problems(folder: Path, *, needs_code: bool) -> list[str]:
    """What is wrong with the values of a checkpoint; empty when all is well.

    Raises:
        CheckpointError: a layer cannot be read, or lacks a tensor.
    """
    if needs_code:
        register()
    model = open_streamed(folder, "auto")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, _TOKENS, generator=generator).to(model.device)
    found = list(_not_finite(model.model, ""))
    calls = model.calls(input_ids=ids)
    hidden = calls[0].hidden
    for index, call in enumerate(calls):
        with model.layer(index) as layer:
            found += [*_not_finite(layer, f"{model.layer_name(index)}."), *_bad_map(layer, index)]
            hidden = call.run(layer, hidden)
    if not model.logits(hidden, input_ids=ids).isfinite().all():
        found.append("logits are not finite")
    return found


def _not_finite(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if not tensor.is_meta and not tensor.isfinite().all():
            yield f"{prefix}{name} is not finite"


def _bad_map(layer: nn.Module, index: int) -> Iterator[str]:
    """An id beyond the stored experts is silently dropped by grouped kernels."""
    block = find_block(layer)
    experts: Any = block.experts if block else None
    if not hasattr(experts, "expert_map"):
        return
    stored = set(range(experts.num_experts))
    if set(experts.expert_map.tolist()) != stored:
        yield f"expert_map of layer {index} does not use each of {len(stored)} stored experts"
    if hasattr(experts, "check_indices"):  # U V + S: rows of S lie inside their matrices
        try:
            experts.check_indices(index)
        except ValueError as error:
            yield str(error)
