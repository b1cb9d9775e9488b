"""A corpus of two domains and the shards over it, for tests that compare replicas."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from models.arrow import write_table
from stages.calibrate.config import CalibrateConfig
from stages.calibrate.stage import ShardUnit, plan
from stages.corpus.config import CorpusConfig, Source
from tests.tiny import EXPERTS, random_ids

# Three batches of two of `code`, four of `text`: seven, no multiple of two or three ranks.
LENGTHS = {"code": [7, 7, 3, 1, 6], "text": [9, 2, 9, 9, 5, 8, 4]}
BATCHES = 7
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


def units_of(model: Path, folder: Path, shards: int, output: str = "shards") -> list[ShardUnit]:
    """The shards over the corpus in `folder`, in batches of two."""
    return plan(
        CalibrateConfig(
            data=CorpusConfig(sources=(Source(path="x"),)), shards=shards, batch_size=2
        ),
        blocks=sum(map(len, LENGTHS.values())),
        corpus=folder / CORPUS,
        model=model,
        num_experts=EXPERTS,
        folder=folder / output / model.name,
        inputs={"model": model.name},
    )


def unit_of(model: Path, folder: Path, output: str = "shards") -> ShardUnit:
    """One shard over everything."""
    (unit,) = units_of(model, folder, 1, output)
    return unit
