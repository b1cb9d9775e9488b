"""The bundled model is a real one, its text is split by document, and its recipe still runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BUNDLED = EXAMPLES / "bundled"
DOMAINS = {"english_prose", "scripture", "chinese_poetry", "legal", "code_python"}


def script(name: str, *words: object) -> str:
    """Output of a script of the recipe."""
    done = subprocess.run(
        [sys.executable, name, *map(str, words)],
        cwd=EXAMPLES / "pretrain",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def figures() -> Any:
    """What the inspection prints, on part of the held-out text."""
    words = ("--model", BUNDLED / "model", "--data", BUNDLED / "data", "--max-tokens", 20_000)
    return json.loads(script("inspect_model.py", *words).splitlines()[-1])


@pytest.mark.slow
def test_perplexity_is_far_below_a_unigram_model_in_every_domain(figures: Any) -> None:
    assert figures["perplexity"].keys() == DOMAINS
    for row in figures["perplexity"].values():
        assert row["model"] < row["unigram_of_domain"] / 4, row


@pytest.mark.slow
def test_no_expert_is_dead_and_experts_specialise(figures: Any) -> None:
    assert len(figures["layers"]) == 5
    for row in figures["layers"]:
        assert row["share_min"] > 0.005, row
    informative = [row for row in figures["layers"] if row["mutual_information_bits"] >= 0.2]
    assert len(informative) >= 4


def test_no_document_is_in_two_splits() -> None:
    seen: set[tuple[str, str]] = set()
    for split in ("calibration", "validation", "test"):
        table = pq.read_table(BUNDLED / "data" / f"{split}.parquet")
        assert set(table["domain"].to_pylist()) == DOMAINS
        pairs = set(zip(table["source"].to_pylist(), table["text"].to_pylist(), strict=True))
        assert not pairs & seen
        seen |= pairs


def test_what_is_bundled_is_small() -> None:
    assert (BUNDLED / "model" / "model.safetensors").stat().st_size <= 16 << 20
    assert sum(p.stat().st_size for p in (BUNDLED / "data").iterdir()) <= 4 << 20


@pytest.mark.slow
def test_the_training_recipe_runs_and_saves_a_checkpoint_that_opens(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for split, source in (("train", "calibration"), ("validation", "validation")):
        table = pq.read_table(BUNDLED / "data" / f"{source}.parquet")
        (corpus / split).mkdir(parents=True)
        for domain in DOMAINS:
            rows = table.filter(table_domain(table, domain))
            pq.write_table(rows, corpus / split / f"{domain}.parquet")
    words = ("--corpus", corpus, "--tokenizer", BUNDLED / "model", "--out", tmp_path / "model")
    script(
        "train.py",
        *words,
        *("--held-out", BUNDLED / "data", "--state", tmp_path / "state.pt"),
        *("--steps", 2, "--per-domain", 1, "--sequence-length", 64, "--warmup", 1),
    )
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_local_experts == 16


def table_domain(table: Any, domain: str) -> Any:
    import pyarrow.compute as pc

    return pc.equal(table["domain"], domain)
