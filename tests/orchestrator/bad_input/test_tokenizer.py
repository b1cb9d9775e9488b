"""Tokenizers that do not belong to the model."""

from __future__ import annotations

import shutil
from pathlib import Path

from stages.corpus.stage import load_tokenizer
from tests.orchestrator.refusals import assert_one_message, assert_refused
from tests.orchestrator.tiny_run import Command, Inputs


def with_words(inputs: Inputs, words: int) -> Path:
    """A copy of the model's tokenizer with so many more words."""
    tokenizer = load_tokenizer(inputs.model)
    tokenizer.add_tokens([f"more{i}" for i in range(words)])
    folder = inputs.root / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


def test_ids_beyond_the_vocabulary_are_refused(coalesce: Command, inputs: Inputs) -> None:
    """The model knows 64 tokens, the tokenizer 63 words and two more."""
    recipe = inputs.recipe(model__tokenizer=str(with_words(inputs, 2)))
    expected = "ids up to 64, the model knows 64 tokens (0 to 63)"
    assert_refused(coalesce, inputs, recipe, expected, "`model.tokenizer`")


def test_a_full_vocabulary_is_accepted(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe(model__tokenizer=str(with_words(inputs, 1)))
    assert coalesce("validate", recipe).code == 0


def test_tokens_cut_by_another_tokenizer_are_not_observed(
    coalesce: Command, inputs: Inputs
) -> None:
    """The text was cut into tokens once; then the tokenizer changes, and the run is resumed."""
    assert coalesce("calibrate", inputs.recipe(), "--quiet").code == 0
    shutil.rmtree(inputs.run_dir / "calibration" / "shards")
    before = (inputs.run_dir / "calibration" / "tokens.arrow").read_bytes()
    path = inputs.model / "tokenizer.json"
    path.write_text(path.read_text().replace('"word7"', '"another"'))

    outcome = coalesce("calibrate", inputs.recipe(), "--quiet")

    assert_one_message(outcome, "corpus/calibration", "tokenizer")
    assert (inputs.run_dir / "calibration" / "tokens.arrow").read_bytes() == before
    assert not (inputs.run_dir / "calibration" / "shards").exists()
