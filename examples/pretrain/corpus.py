"""Reading and writing the parquet documents that every script of this folder shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DOMAINS = ("english_prose", "scripture", "chinese_poetry", "legal", "code_python")

# `english_prose` of the corpus mixes public-domain novels with a GPL text; only the former may be
# redistributed under a permissive licence, so everything else is dropped on reading.
ALLOWED_PREFIX = {"english_prose": "r-cran-janeaustenr/"}


@dataclass(frozen=True, slots=True)
class Document:
    """One document; `source` is unique in the corpus and identifies it across splits."""

    text: str
    domain: str
    source: str

    @property
    def size(self) -> int:
        """Length in UTF-8 bytes, the unit in which budgets are balanced between scripts."""
        return len(self.text.encode())


def read_documents(path: Path) -> list[Document]:
    """All documents of a parquet file, in file order."""
    columns = pq.read_table(path, columns=["text", "domain", "source"]).to_pydict()
    rows = zip(columns["text"], columns["domain"], columns["source"], strict=True)
    return [Document(*row) for row in rows]


def read_domain(corpus: Path, split: str, domain: str) -> list[Document]:
    """The redistributable documents of one domain in one split of the corpus."""
    prefix = ALLOWED_PREFIX.get(domain, "")
    documents = read_documents(corpus / split / f"{domain}.parquet")
    return [document for document in documents if document.source.startswith(prefix)]


def write_documents(path: Path, documents: Sequence[Document]) -> None:
    """Write a zstd parquet file with the columns of the corpus."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "text": [document.text for document in documents],
            "domain": [document.domain for document in documents],
            "source": [document.source for document in documents],
        }
    )
    pq.write_table(table, path, compression="zstd", compression_level=19)


def sources(documents: Iterable[Document]) -> set[str]:
    """Identifiers of the documents."""
    return {document.source for document in documents}
