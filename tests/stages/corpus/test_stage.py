"""A mixture is tokenised once, and its blocks are read back by range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from models.arrow import read_table
from stages.corpus.config import CorpusConfig, Source
from stages.corpus.stage import CorpusUnit, read_blocks, run_one
from stages.errors import DataError

END = 0


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per word: `w7` is 7, the end of a text 0."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"<end>": END} | {f"w{i}": i for i in range(1, 60)}
    words["<unknown>"] = len(words)
    backend = Tokenizer(WordLevel(words, unk_token="<unknown>"))
    backend.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unknown>"
    )
    fast.save_pretrained(folder)
    return folder


def write(path: Path, texts: list[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(path=str(path))


def words(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


def unit(folder: Path, tokenizer: Path, *sources: Source, **fields: Any) -> CorpusUnit:
    config = CorpusConfig(sources=sources, **({"sequence_length": 4, "tokens": 100} | fields))
    return CorpusUnit("corpus", config, tokenizer, folder / "tokens.arrow")


def test_documents_are_joined_by_the_end_of_text_token(tmp_path: Path, tokenizer: Path) -> None:
    job = unit(tmp_path, tokenizer, write(tmp_path / "a.jsonl", ["w1 w2 w3", "w4 w5"]))

    run_one(job)

    tokens = [token for block in read_blocks(job.output) for token in block.tokens]
    assert tokens in ([1, 2, 3, END, 4, 5, END], [4, 5, END, 1, 2, 3, END])


def test_padded_blocks_hold_one_document_each(tmp_path: Path, tokenizer: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["w1 w2 w3 w4 w5 w6", "w7"])
    job = unit(tmp_path, tokenizer, source, layout="padded")

    run_one(job)

    assert {block.tokens for block in read_blocks(job.output)} == {(1, 2, 3, 4), (7,)}


def test_the_budget_is_split_by_weight(tmp_path: Path, tokenizer: Path) -> None:
    small = write(tmp_path / "b.jsonl", [words(1, 50)])
    large = write(tmp_path / "a.jsonl", [words(1, 50)]).model_copy(update={"weight": 3.0})
    job = unit(tmp_path, tokenizer, small, large, tokens=40)

    result = run_one(job)

    assert result["tokens"] == {"a": 30, "b": 10}


def test_a_budget_of_one_source_is_split_evenly_over_its_domains(
    tmp_path: Path, tokenizer: Path
) -> None:
    rows = [{"text": words(1, 50), "topic": topic} for topic in "xyz"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path=str(tmp_path / "a.jsonl"), domain_column="topic")

    result = run_one(unit(tmp_path, tokenizer, source, tokens=31))

    assert result["tokens"] == {"x": 11, "y": 10, "z": 10}


def test_rows_are_sorted_by_domain_and_hold_plain_integers(tmp_path: Path, tokenizer: Path) -> None:
    sources = [write(tmp_path / f"{name}.jsonl", [words(1, 9)]) for name in ("b", "a")]
    job = unit(tmp_path, tokenizer, *sources)

    result = run_one(job)

    table = read_table(job.output)
    assert table["domain"].to_pylist() == ["a"] * 3 + ["b"] * 3
    assert str(table.schema.field("tokens").type) == "list<item: int32>"
    assert result["blocks"] == 6
    assert result["bytes"] == job.output.stat().st_size


def test_a_range_of_blocks_is_that_part_of_all(tmp_path: Path, tokenizer: Path) -> None:
    job = unit(tmp_path, tokenizer, write(tmp_path / "a.jsonl", [words(1, 30)]))
    run_one(job)
    blocks = read_blocks(job.output)

    assert len(blocks) == 8
    assert read_blocks(job.output, 2, 5) == blocks[2:5]
    assert read_blocks(job.output, 6) == blocks[6:]
    assert read_blocks(job.output, 3, 3) == []


def test_the_same_config_writes_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    source = write(tmp_path / "a.jsonl", [words(i, 7) for i in range(1, 9)])
    jobs = [unit(tmp_path / name, tokenizer, source) for name in ("x", "y")]

    for job in jobs:
        run_one(job)

    assert jobs[0].output.read_bytes() == jobs[1].output.read_bytes()
    assert jobs[0].fingerprint == jobs[1].fingerprint


def test_other_text_is_another_fingerprint(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.jsonl"
    before = unit(tmp_path, tokenizer, write(path, ["w1"])).fingerprint

    after = unit(tmp_path, tokenizer, write(path, ["w2"])).fingerprint

    assert {name for name in before if before[name] != after[name]} == {"data"}


def test_another_tokenizer_is_another_fingerprint(tmp_path: Path, tokenizer: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["w1"])
    before = unit(tmp_path, tokenizer, source).fingerprint
    (tmp_path / "tokenizer.json").write_text("{}")

    after = unit(tmp_path, tmp_path, source).fingerprint

    assert {name for name in before if before[name] != after[name]} == {"tokenizer"}


def test_blank_documents_are_refused_when_there_is_nothing_else(
    tmp_path: Path, tokenizer: Path
) -> None:
    job = unit(tmp_path, tokenizer, write(tmp_path / "a.jsonl", ["", "  \n"]))

    with pytest.raises(DataError, match="no document of domain 'a'"):
        run_one(job)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    job = unit(tmp_path, tmp_path, write(tmp_path / "a.jsonl", ["w1"]))

    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        run_one(job)
