"""Tiny random encoder-decoders: their layers, of which every other one has experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "num_experts": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "SwitchTransformers": {
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_heads": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "initializer_factor": 2.0,
    },
    "NllbMoe": {
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "max_position_embeddings": 64,
        "init_std": 0.2,
    },
}
# Every second layer of four in the encoder, then of four in the decoder.
SPARSE = (1, 3, 5, 7)


def seq2seq_model(name: str, **overrides: object) -> Any:
    """A tiny random model in eval mode."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**_COMMON | SEQ2SEQ[name] | overrides)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def save_seq2seq(folder: Path, name: str, **overrides: object) -> Path:
    """A tiny random checkpoint, as `save_pretrained` writes it."""
    seq2seq_model(name, **overrides).save_pretrained(folder)
    return folder
