"""A corpus of two domains and the shards over it, for tests that compare replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from models.arrow import write_table
from stages.calibrate.config import CalibrateConfig
from stages.calibrate.stage import ShardUnit, plan
from stages.corpus.config import CorpusConfig, Source
from tests.tiny import random_ids, save_tiny

# Divided by two and by four ranks.
EXPERTS = 8
# Three batches of two of `code`, four of `text`: in three shards of 2, 2 and 3 batches.
LENGTHS = {"code": [7, 7, 3, 1, 6], "text": [9, 2, 9, 9, 5, 8, 4]}
SHARDS = 3
CORPUS = "tokens.arrow"


def write_corpus(folder: Path) -> Path:
    """Blocks of different lengths."""
    rows = [(domain, each) for domain, lengths in LENGTHS.items() for each in lengths]
    tokens = [random_ids(1, length, seed)[0].tolist() for seed, (_, length) in enumerate(rows)]
    columns = {
        "domain": pa.array([domain for domain, _ in rows]),
        "tokens": pa.array(tokens, pa.list_(pa.int32())),
    }
    write_table(folder / CORPUS, pa.table(columns))
    return folder / CORPUS


def save_dealt(folder: Path, family: str) -> Path:
    """A tiny checkpoint whose experts several ranks can share."""
    name = "num_local_experts" if family == "mixtral" else "num_experts"
    return save_tiny(folder, family, **{name: EXPERTS})


def units_of(
    model: Path, folder: Path, shards: int = SHARDS, output: str = "shards", **fields: Any
) -> list[ShardUnit]:
    """The shards over the corpus in `folder`, in batches of two."""
    source = CorpusConfig(sources=(Source(path="x"),))
    engine = fields.pop("engine", "resident")
    return plan(
        CalibrateConfig(data=source, shards=shards, batch_size=2, **fields),
        blocks=sum(map(len, LENGTHS.values())),
        corpus=folder / CORPUS,
        model=model,
        num_experts=EXPERTS,
        folder=folder / output / model.name,
        inputs={"model": model.name},
        engine=engine,
    )
