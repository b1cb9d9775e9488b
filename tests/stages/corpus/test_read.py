"""Documents by domain, in an order that depends on the seed alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.corpus.config import Source
from stages.corpus.read import check_source, documents, local_files
from stages.errors import DataError

ROWS = [{"text": f"{topic} {i}", "topic": topic} for i in range(6) for topic in ("law", "code")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, kind: str) -> Path:
    path = folder / f"corpus.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "txt":
        path.write_text("".join(f"{row['text']}\n" for row in ROWS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read(source: Source, seed: int = 0) -> dict[str, list[str]]:
    return {domain: list(texts) for domain, texts in documents(source, seed).items()}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "txt"])
def test_every_kind_of_file_is_read(tmp_path: Path, kind: str) -> None:
    found = read(Source(path=str(write(tmp_path, kind))))

    assert list(found) == ["corpus"]
    assert sorted(found["corpus"]) == sorted(row["text"] for row in ROWS)


def test_a_column_gives_the_domains(tmp_path: Path) -> None:
    found = read(Source(path=str(write(tmp_path, "parquet")), domain_column="topic"))

    assert list(found) == ["code", "law"]
    assert sorted(found["law"]) == [f"law {i}" for i in range(6)]


def test_a_named_domain_overrules_the_column(tmp_path: Path) -> None:
    path = str(write(tmp_path, "parquet"))

    assert list(read(Source(path=path, domain="all", domain_column="topic"))) == ["all"]


def test_the_seed_alone_decides_the_order(tmp_path: Path) -> None:
    source = Source(path=str(write(tmp_path, "parquet")))

    assert read(source, 1) == read(source, 1)
    assert read(source, 1) != read(source, 2)


def test_a_folder_is_read_with_its_subfolders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    first, second = write(tmp_path, "jsonl"), write(tmp_path / "sub", "jsonl")
    (tmp_path / "notes.md").write_text("not a text source")

    source = Source(path=str(tmp_path))

    assert local_files(source) == sorted(map(str, (first, second)))
    assert len(next(iter(read(source).values()))) == 2 * len(ROWS)


def test_a_pattern_names_several_files(tmp_path: Path) -> None:
    for name in ("a", "b", "other"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")

    assert sorted(read(Source(path=str(tmp_path / "?.txt"), domain="d"))["d"]) == ["a", "b"]


def test_files_of_different_kinds_are_refused_together(tmp_path: Path) -> None:
    write(tmp_path, "parquet")
    (tmp_path / "LICENSE.txt").write_text("not a document\n")

    with pytest.raises(DataError, match="holds parquet and text files"):
        check_source(Source(path=str(tmp_path)))


@pytest.mark.parametrize("path", ["none.parquet", "./none", "/none/x", "*.txt"])
def test_a_source_that_is_not_there_is_refused(path: str, tmp_path: Path) -> None:
    name = path if path.startswith(("/", ".")) else str(tmp_path / path)

    with pytest.raises(DataError, match="no file matches"):
        check_source(Source(path=name))


@pytest.mark.parametrize("field", ["text_column", "domain_column"])
def test_an_unknown_column_is_refused_with_those_that_exist(tmp_path: Path, field: str) -> None:
    source = Source.model_validate({"path": str(write(tmp_path, "parquet")), field: "nothing"})

    with pytest.raises(DataError, match="no column 'nothing'; it has text, topic"):
        check_source(source)


def test_a_column_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"text": 1}\n')

    with pytest.raises(DataError, match="holds int64, not text"):
        read(Source(path=str(path)))


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")

    with pytest.raises(DataError, match="hold a document"):
        check_source(Source(path=str(tmp_path / "empty.parquet")))


def test_a_source_of_blank_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n{"text": null}\n{"text": ""}\n')

    with pytest.raises(DataError, match="no document of domain 'blank'"):
        check_source(Source(path=str(tmp_path / "blank.jsonl")))


def test_a_null_is_a_document_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n')

    assert sorted(read(Source(path=str(tmp_path / "a.jsonl")))["a"]) == ["", "x"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")

    with pytest.raises(DataError, match="cannot read"):
        check_source(Source(path=str(tmp_path / "bad.parquet")))


def test_a_hub_name_is_left_to_the_download(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    check_source(Source(path="owner/name"))
