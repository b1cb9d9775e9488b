"""Tokenises a corpus once; every later unit reads a range of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from models.arrow import write_table
from models.atomic import file_digest, quick_digest, text_digest
from stages.corpus.blocks import Block, packed, padded, split_budget
from stages.corpus.config import VERSION, CorpusConfig, DedupConfig
from stages.corpus.overlap import Deduplication, Evaluated
from stages.corpus.read import documents, local_files, no_tokens
from stages.errors import DataError
from stages.unit import Fingerprint, OneFile

# (domain, tokenised documents) -> those that are used.
Through = Callable[[str, Iterable[list[int]]], Iterator[list[int]]]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class CorpusUnit(OneFile):
    """Tokenises one mixture into one Arrow file."""

    name: str
    config: CorpusConfig
    tokenizer: Path
    output: Path
    # Text that is evaluated and that documents are compared with; None: they are not.
    evaluated: CorpusConfig | None = None
    dedup: DedupConfig = field(default_factory=lambda: DedupConfig(mode="off"))
    # Where text from behind URLs lies; its files were looked at before the run.
    fetched: Path | None = None

    @property
    def compares(self) -> bool:
        """Whether documents are compared with those that are evaluated."""
        return self.evaluated is not None and self.dedup.mode != "off"

    @property
    def fingerprint(self) -> Fingerprint:
        """Tokenizer files, content of local text files, config and code version."""
        return {
            "code": f"corpus-{VERSION}",
            "config": self.config.model_dump(mode="json"),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "data": data_digest(self.config, self.fetched),
        } | self._comparison

    @property
    def _comparison(self) -> Fingerprint:
        if self.evaluated is None or not self.compares:
            return {}
        config = self.evaluated.model_dump(mode="json")
        data = data_digest(self.evaluated, self.fetched)
        return {"dedup": [self.dedup.model_dump(mode="json"), config, data]}


def run_one(unit: CorpusUnit) -> dict[str, Any]:
    """Reads, tokenises and packs; writes `domain, tokens` rows, sorted by domain.

    Raises:
        DataError: no document of a source has a single token, or all are evaluated as well.
    """
    tokenizer = load_tokenizer(unit.tokenizer)
    dedup = _deduplication(unit, tokenizer)
    through = _all_of_them if dedup is None else dedup.passed
    blocks = list(_blocks(unit.config, tokenizer, through, unit.fetched))
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
    result = {"blocks": len(blocks), "tokens": counts, "bytes": unit.output.stat().st_size}
    return result | ({} if dedup is None else {"overlap": dedup.as_json()})


def _deduplication(unit: CorpusUnit, tokenizer: Any) -> Deduplication | None:
    """Reads the evaluated documents once more, as far as they are evaluated."""
    if unit.evaluated is None or not unit.compares:
        return None
    held = Evaluated(unit.dedup.run)

    def through(_: str, found: Iterable[list[int]]) -> Iterator[list[int]]:
        return held.collect(found)

    for _ in _blocks(unit.evaluated, tokenizer, through, unit.fetched):
        pass
    return Deduplication(unit.dedup, held)


def _all_of_them(domain: str, documents: Iterable[list[int]]) -> Iterator[list[int]]:
    return iter(documents)


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


def _blocks(
    config: CorpusConfig, tokenizer: Any, through: Through, fetched: Path | None
) -> Iterator[Block]:
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
            used = through(domain, _encoded(texts, tokenizer))
            found = list(_domain_blocks(config, domain, used, tokenizer, share))
            if not found:
                raise no_tokens(domain, source)
            yield from found


def _encoded(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    # Tokenizers put their own special tokens on every document, so blank ones are told by text.
    return (tokenizer(text, verbose=False).input_ids for text in texts if text.strip())


def _domain_blocks(
    config: CorpusConfig,
    domain: str,
    documents: Iterator[list[int]],
    tokenizer: Any,
    budget: int,
) -> Iterator[Block]:
    if config.layout == "padded":
        return padded(domain, documents, config.sequence_length, budget)
    end = tokenizer.eos_token_id
    separator = [] if end is None else [int(end)]
    return packed(domain, documents, config.sequence_length, budget, separator)


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
