"""Opening a checkpoint in transformers, the same way for every stage that runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.classes import prepare_classes
from models.quantised import Dequantised, dequantised


def load_model(folder: Path, dtype: str, *, trust_remote_code: bool = False) -> Any:
    """A causal LM, or an encoder-decoder, in eval mode on this worker's device.

    Args:
        folder: checkpoint folder; only files in it are read, nothing is downloaded.
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.
        trust_remote_code: only ever set for the modeling file that Coalesce itself wrote.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    checkpoint = dequantised(Checkpoint.open(folder, allow_links=True))
    prepare_classes(checkpoint.config)
    if isinstance(checkpoint, Dequantised):
        model = load_decoded(checkpoint, dtype)
    else:
        folder = checkpoint.complete()
        options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(folder, **options)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(folder, dtype=dtype, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def load_decoded(checkpoint: Dequantised, dtype: str) -> Any:
    """A quantised causal LM in floating point, all of it decoded first.

    transformers decodes on a CPU too, but only with another package, and not all block shapes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**checkpoint.config)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    tensors = checkpoint.read(checkpoint.tensors)
    return kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def pad_id(model: Any) -> int:
    """A token to fill short rows with; it is masked, so any valid id will do."""
    value = model.config.pad_token_id
    return 0 if value is None else int(value)


def start_id(model: Any) -> int:
    """What the decoder of an encoder-decoder begins with; without a word of its own, padding."""
    named = (
        getattr(each, "decoder_start_token_id", None)
        for each in (model.config, model.generation_config)
    )
    return next((int(each) for each in named if each is not None), pad_id(model))


def batch_of(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[B, S] int64 ids, padded on the right, and their [B, S] bool mask."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = True
    return ids.to(device), mask.to(device)
