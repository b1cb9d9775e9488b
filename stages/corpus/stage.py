"""Tokenises a corpus once; every later unit reads a range of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from models.arrow import write_table
from models.atomic import file_digest, quick_digest, text_digest
from stages.corpus.blocks import Block, packed, padded, split_budget
from stages.corpus.config import VERSION, CorpusConfig
from stages.corpus.read import documents, local_files, no_tokens
from stages.errors import DataError
from stages.unit import Fingerprint, OneFile

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class CorpusUnit(OneFile):
    """Tokenises one mixture into one Arrow file."""

    name: str
    config: CorpusConfig
    tokenizer: Path
    output: Path
    # Where text from behind URLs lies; its files were looked at before the run.
    fetched: Path | None = None

    @property
    def fingerprint(self) -> Fingerprint:
        """Tokenizer files, content of local text files, config and code version."""
        return {
            "code": f"corpus-{VERSION}",
            "config": self.config.model_dump(mode="json"),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "data": data_digest(self.config, self.fetched),
        }


def run_one(unit: CorpusUnit) -> dict[str, Any]:
    """Reads, tokenises and packs; writes `domain, tokens` rows, sorted by domain.

    Raises:
        DataError: no document of a source has a single token.
    """
    blocks = list(_blocks(unit.config, load_tokenizer(unit.tokenizer), unit.fetched))
    blocks.sort(key=lambda block: block.domain)
    table = pa.table(
        {
            "domain": pa.array([b.domain for b in blocks], pa.string()),
            "tokens": pa.array([b.tokens for b in blocks], pa.list_(pa.int32())),
        }
    )
    write_table(unit.output, table)
    counts: dict[str, int] = {}
    for block in blocks:
        counts[block.domain] = counts.get(block.domain, 0) + len(block.tokens)
    return {"blocks": len(blocks), "tokens": counts, "bytes": unit.output.stat().st_size}


def read_blocks(path: Path, start: int = 0, stop: int | None = None) -> list[Block]:
    """Blocks `start` to `stop` of a corpus file; only their pages are read."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        return _blocks_of(table.slice(start, None if stop is None else stop - start))


def read_domain(path: Path, domain: str) -> list[Block]:
    """All blocks of one domain, in order."""
    with pa.memory_map(str(path)) as source:
        return _blocks_of(pa.ipc.open_file(source).read_all().filter(pc.field("domain") == domain))


def count_blocks(path: Path) -> int:
    """Number of blocks."""
    with pa.memory_map(str(path)) as source:
        return int(pa.ipc.open_file(source).read_all().num_rows)


def block_domains(path: Path) -> list[str]:
    """Domains, sorted."""
    with pa.memory_map(str(path)) as source:
        return sorted(pc.unique(pa.ipc.open_file(source).read_all()["domain"]).to_pylist())


def block_lengths(path: Path) -> tuple[Any, list[str]]:
    """Tokens per block `[B]` int64, and the domain of each block; no token is read."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        lengths = pc.list_value_length(table["tokens"]).to_numpy().astype("int64")
        return lengths, table["domain"].to_pylist()


def count_tokens(path: Path) -> int:
    """Tokens in all blocks."""
    with pa.memory_map(str(path)) as source:
        tokens = pa.ipc.open_file(source).read_all()["tokens"]
        return int(pc.sum(pc.list_value_length(tokens)).as_py() or 0)


def _blocks_of(table: pa.Table) -> list[Block]:
    return [Block(row["domain"], tuple(row["tokens"])) for row in table.to_pylist()]


def tokenizer_digest(folder: Path) -> str:
    """Digest of the files that define a tokenizer."""
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    return text_digest({path.name: file_digest(path) for path in files})


def data_digest(config: CorpusConfig, fetched: Path | None = None) -> str:
    """Digest of the content of all files, and of the names of hub datasets."""
    content = {
        source.path: [quick_digest(Path(f)) for f in local_files(source, fetched)] or source.split
        for source in config.sources
    }
    return text_digest(content)


def _blocks(config: CorpusConfig, tokenizer: Any, fetched: Path | None) -> Iterator[Block]:
    budgets = split_budget(config.tokens, [source.weight for source in config.sources])
    for source, budget in zip(config.sources, budgets, strict=True):
        by_domain = documents(source, config.seed, fetched)
        shares = split_budget(budget, [1.0] * len(by_domain))
        for (domain, texts), share in zip(by_domain.items(), shares, strict=True):
            if share < 2:
                raise DataError(
                    f"{config.tokens} tokens leave {share} for domain {domain!r}",
                    "raise `tokens` of this section, or the weight of the source",
                )
            found = list(_domain_blocks(config, domain, texts, tokenizer, share))
            if not found:
                raise no_tokens(domain, source)
            yield from found


def _domain_blocks(
    config: CorpusConfig, domain: str, texts: Iterator[str], tokenizer: Any, budget: int
) -> Iterator[Block]:
    # Tokenizers put their own special tokens on every document, so blank ones are told by text.
    encoded: Iterator[list[int]] = (
        tokenizer(text, verbose=False).input_ids for text in texts if text.strip()
    )
    if config.layout == "padded":
        return padded(domain, encoded, config.sequence_length, budget)
    end = tokenizer.eos_token_id
    separator = [] if end is None else [int(end)]
    return packed(domain, encoded, config.sequence_length, budget, separator)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; code that lies in it is never run.

    Raises:
        DataError: none can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"no tokenizer can be loaded from {folder}: {error}",
            "put the tokenizer's files beside the checkpoint, or set `model.tokenizer`",
        ) from error
