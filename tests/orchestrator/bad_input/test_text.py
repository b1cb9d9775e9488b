"""Calibration text that is missing, empty or not text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.load import load
from orchestrator.preflight import prepare
from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import (
    Command,
    Inputs,
    write_jsonl,
)


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_a_data_file_that_is_missing_is_refused(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.source(inputs.root / "nowhere.jsonl")
    assert_refused(coalesce, inputs, recipe, "no file matches", "nowhere.jsonl", "check the path")


def test_an_empty_data_file_is_refused(coalesce: Command, inputs: Inputs) -> None:
    (inputs.root / "empty.jsonl").write_text("")
    recipe = inputs.source(inputs.root / "empty.jsonl")
    assert_refused(coalesce, inputs, recipe, "empty.jsonl", "does it hold a document?")


def test_a_table_without_rows_is_refused(coalesce: Command, inputs: Inputs) -> None:
    import pyarrow as pa

    path = parquet(inputs.root / "none.parquet", {"text": pa.array([], pa.string())})
    recipe = inputs.source(path)
    assert_refused(coalesce, inputs, recipe, "none.parquet", "does it hold a document?")


def test_a_damaged_data_file_is_refused(coalesce: Command, inputs: Inputs) -> None:
    (inputs.root / "bad.parquet").write_bytes(b"PAR1 but no more")
    recipe = inputs.source(inputs.root / "bad.parquet")
    assert_refused(coalesce, inputs, recipe, "cannot read", "bad.parquet")


@pytest.mark.parametrize("key", ["text_column", "domain_column"])
def test_an_unknown_column_is_refused_with_those_that_exist(
    coalesce: Command, inputs: Inputs, key: str
) -> None:
    recipe = inputs.source(inputs.text, **{key: "body"})
    assert_refused(coalesce, inputs, recipe, "no column 'body'; it has text", f"`{key}`")


def test_a_text_column_of_numbers_is_refused(coalesce: Command, inputs: Inputs) -> None:
    path = write_jsonl(inputs.root / "numbers.jsonl", [{"text": 7}, {"text": 8}])
    assert_refused(coalesce, inputs, inputs.source(path), "'text'", "int64, not text")


def test_a_text_column_of_lists_is_refused(coalesce: Command, inputs: Inputs) -> None:
    path = write_jsonl(inputs.root / "lists.jsonl", [{"text": ["word1", "word2"]}])
    assert_refused(coalesce, inputs, inputs.source(path), "'text'", "List, not text")


def test_a_domain_of_blank_documents_is_refused_by_name(coalesce: Command, inputs: Inputs) -> None:
    rows = [{"text": "word1 word2", "kind": "law"}, {"text": " \n\t", "kind": "poems"}]
    path = write_jsonl(inputs.root / "mixed.jsonl", rows)
    recipe = inputs.source(path, domain_column="kind")
    assert_refused(coalesce, inputs, recipe, "'poems'", "mixed.jsonl")


def test_text_for_evaluation_is_looked_at_as_well(coalesce: Command, inputs: Inputs) -> None:
    sources = [{"path": str(inputs.root / "held-out.txt")}]
    recipe = inputs.recipe(evaluate__data__sources=sources)
    assert_refused(coalesce, inputs, recipe, "held-out.txt")


def tokens_of(inputs: Inputs, recipe: Path) -> dict[str, int]:
    """What the corpus stage makes of a recipe's calibration text."""
    from orchestrator.pipeline import corpus_units
    from stages.corpus import stage as corpus

    (unit,) = corpus_units(prepare(load(str(recipe)).config))
    unit = replace(unit, output=inputs.root / "tokens.arrow")
    tokens: dict[str, int] = corpus.run_one(unit)["tokens"]
    return tokens


def test_blank_documents_among_others_are_skipped(inputs: Inputs) -> None:
    rows = [{"text": ""}, {"text": "word1 word2 word3"}, {"text": "   "}, {"text": None}]
    path = write_jsonl(inputs.root / "some.jsonl", rows)
    assert tokens_of(inputs, inputs.source(path)) == {"some": 4}  # and the end of the text


def test_jsonl_text_and_parquet_give_the_same_tokens(inputs: Inputs) -> None:
    texts = ["word1 word2", "word3 word4 word5"]
    (inputs.root / "as.txt").write_text("\n".join(texts) + "\n")
    paths = [
        write_jsonl(inputs.root / "as.jsonl", [{"text": text} for text in texts]),
        parquet(inputs.root / "as.parquet", {"text": texts}),
        inputs.root / "as.txt",
    ]
    assert [tokens_of(inputs, inputs.source(path)) for path in paths] == [{"as": 7}] * 3


def test_a_folder_of_files_is_one_source(inputs: Inputs) -> None:
    folder = inputs.root / "many"
    folder.mkdir()
    for name in ("a", "b"):
        write_jsonl(folder / f"{name}.jsonl", [{"text": "word1 word2"}])
    assert tokens_of(inputs, inputs.source(folder)) == {"many": 6}


def test_fewer_tokens_than_domains_are_refused(coalesce: Command, inputs: Inputs) -> None:
    outcome = coalesce("run", inputs.recipe(calibrate__data__tokens=1), "--quiet")
    assert outcome.code == 2
    assert "1 tokens leave 1 for domain 'prose'" in outcome.err


def test_sequences_longer_than_the_model_knows_are_refused(
    coalesce: Command, inputs: Inputs
) -> None:
    recipe = inputs.recipe(calibrate__data__sequence_length=65)
    assert_refused(coalesce, inputs, recipe, "sequence_length is 65, the model knows 64 positions")
