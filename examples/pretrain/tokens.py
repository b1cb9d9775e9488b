"""Token streams: one long id tensor per domain, and balanced random windows out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from corpus import DOMAINS, Document, read_documents, read_domain, sources


def encode_stream(tokenizer_dir: Path, documents: Sequence[Document]) -> Tensor:
    """Ids of all documents [N], each ended by the end-of-sequence token."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    batch = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return torch.tensor([token for ids in batch for token in (*ids, end)], dtype=torch.long)


def training_streams(corpus: Path, tokenizer_dir: Path, held_out: Path) -> dict[str, Tensor]:
    """Stream per domain of the train split, without the documents of the bundled held-out files."""
    excluded: set[str] = set()
    for name in ("validation", "test"):
        excluded |= sources(read_documents(held_out / f"{name}.parquet"))
    streams = {}
    for domain in DOMAINS:
        documents = read_domain(corpus, "train", domain)
        kept = [document for document in documents if document.source not in excluded]
        streams[domain] = encode_stream(tokenizer_dir, kept)
    return streams


def sample_batch(
    streams: Mapping[str, Tensor], per_domain: int, length: int, generator: torch.Generator
) -> Tensor:
    """Random windows [domains * per_domain, length], the same number from each domain."""
    windows = []
    for stream in streams.values():
        starts = torch.randint(len(stream) - length, (per_domain, 1), generator=generator)
        windows.append(stream[starts + torch.arange(length)])
    return torch.cat(windows)
