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
