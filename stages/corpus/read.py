"""Documents of one source, by domain, in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from models.remote.texts import fetch_texts, fetched_texts
from models.remote.urls import is_url
from stages.corpus.config import Source
from stages.errors import DataError

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text"}
_COMPLETE = "is the file complete, and does it hold a document?"
_HUB = "without network, give a local file instead of a hub name"


def documents(source: Source, seed: int, fetched: Path | None = None) -> dict[str, Iterator[str]]:
    """Domain -> its texts, shuffled with `seed`; the order does not depend on other sources.

    Args:
        fetched: where text from behind URLs lies (`check_source` puts it there).

    Raises:
        DataError: nothing there, an unknown column, or a value that is not text.
    """
    dataset = _load(source, fetched).shuffle(seed=seed)
    if source.domain is not None or source.domain_column is None:
        return {source.domain or Path(source.path).stem: _texts(dataset, source)}
    names = sorted({str(name) for name in dataset.unique(source.domain_column)})
    column = [str(name) for name in dataset[source.domain_column]]
    rows = {name: [i for i, each in enumerate(column) if each == name] for name in names}
    return {name: _texts(dataset.select(rows[name]), source) for name in names}


def check_source(source: Source, fetched: Path | None = None) -> set[str]:
    """The domains of a source, which is looked at; a hub name, left to the download, counts as one.

    Args:
        fetched: text behind a URL is fetched to here.

    Raises:
        DataError: unreadable, an unknown column, no text, or a domain of blank documents.
        StorageError: nothing is behind the URL, or not for us.
    """
    if is_url(source.path):
        assert fetched is not None
        fetch_texts(source.path, fetched, tuple(_BUILDERS))
    if not local_files(source, fetched):
        if _looks_local(source.path):
            raise DataError(f"no file matches {source.path}", "check the path of this text source")
        return {source.domain or source.path}
    found = documents(source, 0, fetched)
    for domain, texts in found.items():
        if not any(text.strip() for text in texts):
            raise no_tokens(domain, source)
    return set(found)


def no_tokens(domain: str, source: Source) -> DataError:
    """The error for a domain without a single token."""
    return DataError(
        f"no document of domain {domain!r} in {source.path} has a single token",
        "remove this source, or give it text",
    )


def local_files(source: Source, fetched: Path | None = None) -> list[str]:
    """Files on this machine that the source names; empty for a hub dataset.

    Args:
        fetched: where text from behind URLs lies.
    """
    if is_url(source.path):
        return [] if fetched is None else [str(p) for p in fetched_texts(source.path, fetched)]
    path = Path(source.path)
    pattern = str(path / "**" / "*") if path.is_dir() else source.path
    return sorted(f for f in glob(pattern, recursive=True) if Path(f).suffix in _BUILDERS)


def _looks_local(path: str) -> bool:
    return Path(path).suffix in _BUILDERS or path.startswith((".", "/", "~")) or "*" in path


def _load(source: Source, fetched: Path | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, our error says
    files = local_files(source, fetched)
    builders = sorted({_BUILDERS[Path(file).suffix] for file in files})
    if len(builders) > 1:
        raise DataError(
            f"{source.path} holds {' and '.join(builders)} files",
            "name one kind with a pattern, such as folder/*.parquet",
        )
    try:
        if files:
            dataset = datasets.load_dataset(builders[0], data_files=files, split="train")
        else:
            dataset = datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # the library's many exception types all mean: cannot be read
        # `datasets` wraps the reader's own error in one that says nothing.
        reason = " ".join((str(error.__cause__ or "") or str(error)).split())
        remedy = _COMPLETE if files else _HUB
        raise DataError(f"cannot read {source.path}: {reason}", remedy) from error
    _check_columns(dataset, source)
    return dataset


def _check_columns(dataset: Any, source: Source) -> None:
    if len(dataset) == 0:
        raise DataError(f"{source.path} holds no document", "give a source with text")
    for column in filter(None, (source.text_column, source.domain_column)):
        if column not in dataset.column_names:
            raise DataError(
                f"{source.path} has no column {column!r}; it has {', '.join(dataset.column_names)}",
                "set `text_column` or `domain_column` of this source",
            )
    feature = dataset.features[source.text_column]
    kind = getattr(feature, "dtype", type(feature).__name__)
    if kind not in ("string", "large_string"):
        raise DataError(
            f"column {source.text_column!r} of {source.path} holds {kind}, not text",
            "set `text_column` of this source",
        )


def _texts(dataset: Any, source: Source) -> Iterator[str]:
    """A null is a document without text."""
    for row in dataset:
        yield row[source.text_column] or ""
