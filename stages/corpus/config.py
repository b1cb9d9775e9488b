"""Config of the corpus stage: which text, how much of each domain, in which blocks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.settings import Settings

VERSION = 1


class Source(Settings):
    """One text source: a parquet/JSONL/text file, a folder or glob of them, or a hub name.

    File, folder and glob may be behind a URL: `s3://bucket/news/*.parquet`.
    """

    path: str
    # The domain of every document, or None: taken from `domain_column`, else the file's name.
    domain: str | None = None
    domain_column: str | None = None
    text_column: str = "text"
    # Share of the token budget, relative to the other sources.
    weight: float = Field(default=1.0, gt=0)
    # Hub datasets only.
    subset: str | None = None
    split: str = "train"


class CorpusConfig(Settings):
    """A mixture of sources cut into blocks of `sequence_length` tokens of one domain each."""

    sources: tuple[Source, ...] = Field(min_length=1)
    tokens: int = Field(default=131_072, gt=0)
    sequence_length: int = Field(default=512, gt=1)
    # packed: documents of a domain joined by the end-of-text token; padded: one document a block.
    layout: Literal["packed", "padded"] = "packed"
    seed: int = 0


class DedupConfig(Settings):
    """What becomes of calibration documents that are also evaluated."""

    # warn: counted by domain, and named. drop: left out as well, others take their place.
    mode: Literal["warn", "drop", "off"] = "warn"
    # Tokens of a run; documents are compared by their runs.
    run: int = Field(default=13, gt=0)
    # A document is shared if so much of its runs occurs in evaluated documents, or all of it does.
    share: float = Field(default=0.5, gt=0, le=1)
