"""Calibration documents that are also evaluated are found exactly, counted and left out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.arrow import read_table
from stages.corpus.config import CorpusConfig, DedupConfig, Source
from stages.corpus.overlap import Deduplication, Evaluated, runs, warnings
from stages.corpus.stage import CorpusUnit, read_blocks, run_one
from stages.errors import DataError
from tests.orchestrator.tiny_run import save_tokenizer
from tests.tiny import PROPERTY

DOCUMENT = st.lists(st.integers(0, 3), max_size=12)
DOCUMENTS = st.lists(DOCUMENT, max_size=6)


def evaluated(documents: list[list[int]], run: int) -> Evaluated:
    found = Evaluated(run)
    assert list(found.collect(documents)) == documents
    return found


def occurs(part: list[int], documents: list[list[int]]) -> bool:
    """The oracle: every place of every document is looked at."""
    size = len(part)
    return any(part == d[i : i + size] for d in documents for i in range(len(d) - size + 1))


@PROPERTY
@given(held=DOCUMENTS, document=DOCUMENT, run=st.integers(1, 5))
def test_the_share_is_that_of_runs_that_occur(
    held: list[list[int]], document: list[int], run: int
) -> None:
    parts = [document[i : i + run] for i in range(len(document) - run + 1)]
    expected = sum(occurs(part, held) for part in parts) / len(parts) if parts else 0.0

    found = evaluated(held, run)

    assert found.share(document) == expected
    assert found.identical(document) == (document in held)
    assert len(runs(document, run)) == len(parts)


@PROPERTY
@given(held=DOCUMENTS, documents=DOCUMENTS, share=st.floats(0.01, 1), drop=st.booleans())
def test_every_document_is_counted_once_and_dropped_only_where_it_is_shared(
    held: list[list[int]], documents: list[list[int]], share: float, drop: bool
) -> None:
    config = DedupConfig(mode="drop" if drop else "warn", run=2, share=share)
    known = evaluated(held, 2)
    shared = [d for d in documents if d in held or known.share(d) >= share]
    dedup = Deduplication(config, known)
    if drop and documents and len(shared) == len(documents):
        with pytest.raises(DataError, match=r"all \d+ calibration documents of domain 'x'"):
            list(dedup.passed("x", documents))
        return

    kept = list(dedup.passed("x", documents))

    assert kept == ([d for d in documents if d not in shared] if drop else documents)
    counts = dedup.as_json()["x"]
    assert counts["documents"] == len(documents)
    assert counts["tokens"] == sum(map(len, documents))
    assert counts["identical"] + counts["similar"] == len(shared)
    assert counts["identical"] == sum(d in held for d in documents)
    assert counts["shared_tokens"] == sum(map(len, shared))


def test_unlike_random_text_shares_nothing() -> None:
    generator = random.Random(0)
    texts = [[generator.randrange(4096) for _ in range(500)] for _ in range(40)]

    known = evaluated(texts[:20], 13)

    assert {known.share(each) for each in texts[20:]} == {0.0}
    assert {known.share(each[100:300]) for each in texts[:20]} == {1.0}


def text(first: int, count: int) -> str:
    return " ".join(f"word{i % 60}" for i in range(first, first + 7 * count, 7))


def write(path: Path, texts: dict[str, str]) -> Source:
    """Documents of one domain, each of a name."""
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts.values()))
    return Source(path=str(path), domain="d")


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Source, Source, dict[str, str]]:
    """Calibration and evaluation text: one common document, one that was extended, three others."""
    common, base = text(1, 40), text(2, 40)
    own = {
        name: " ".join(f"word{(i * k) % 60}" for i in range(40))
        for k, name in zip((11, 13, 17), "abc", strict=True)
    }
    calibration = {"common": common, "longer": base + " " + text(3, 10), **own}
    return (
        write(tmp_path / "calibration.jsonl", calibration),
        write(tmp_path / "evaluation.jsonl", {"common": common, "base": base}),
        own,
    )


def unit(folder: Path, sources: tuple[Source, Source, Any], **dedup: Any) -> CorpusUnit:
    save_tokenizer(folder / "tokenizer")
    shape = {"tokens": 4000, "sequence_length": 16}
    calibration, evaluation = (CorpusConfig(sources=(s,), **shape) for s in sources[:2])
    output = folder / "tokens.arrow"
    config = DedupConfig(run=8, **dedup)
    return CorpusUnit("corpus", calibration, folder / "tokenizer", output, evaluation, config)


def test_shared_documents_are_counted_and_named(tmp_path: Path, sources: Any) -> None:
    result = run_one(unit(tmp_path, sources, mode="warn"))

    (counts,) = result["overlap"].values()
    assert {key: counts[key] for key in ("documents", "identical", "similar")} == {
        "documents": 5,
        "identical": 1,
        "similar": 1,
    }
    assert counts["shared_tokens"] == 40 + 50
    (line,) = warnings(result["overlap"], 0.5)
    assert line.startswith("calibration text of d: 2 of 5 documents (90 of 210 tokens)")
    assert "calibrate.dedup.mode=drop" in line


def test_dropped_documents_leave_the_others_as_they_were(tmp_path: Path, sources: Any) -> None:
    warned, dropped = unit(tmp_path / "w", sources), unit(tmp_path / "d", sources, mode="drop")

    first, second = run_one(warned), run_one(dropped)

    assert second["tokens"]["d"] == 3 * 41  # with the end of the text
    assert first["tokens"]["d"] == second["tokens"]["d"] + 41 + 51
    assert "were left out" in warnings(second["overlap"], 0.5)[0]
    tokens = [token for block in read_blocks(dropped.output) for token in block.tokens]
    alone = unit(tmp_path / "alone", (write(tmp_path / "own.jsonl", sources[2]), sources[1], {}))
    assert sorted(_documents(tokens)) == sorted(
        _documents([t for b in read_blocks(run_one(alone) and alone.output) for t in b.tokens])
    )


def _documents(tokens: list[int]) -> list[tuple[int, ...]]:
    """Cut at the end-of-text token, 1."""
    text = " ".join(map(str, tokens))
    return [tuple(map(int, each.split())) for each in text.split(" 1 ") if each]


def test_watching_changes_no_token_and_off_compares_nothing(tmp_path: Path, sources: Any) -> None:
    units = [unit(tmp_path / mode, sources, mode=mode) for mode in ("warn", "off")]

    results = [run_one(each) for each in units]

    assert read_table(units[0].output).equals(read_table(units[1].output))
    assert "overlap" not in results[1]


def test_the_fingerprint_follows_the_evaluated_text(tmp_path: Path, sources: Any) -> None:
    one, off = unit(tmp_path, sources), unit(tmp_path, sources, mode="off")
    before = one.fingerprint
    Path(sources[1].path).write_text('{"text": "word1"}\n')

    assert one.fingerprint != before
    assert "dedup" not in off.fingerprint
    assert unit(tmp_path, sources, share=0.7).fingerprint != one.fingerprint


def test_text_that_is_all_evaluated_is_refused_where_it_is_dropped(
    tmp_path: Path, sources: Any
) -> None:
    same = (sources[1], sources[1], {})

    with pytest.raises(DataError, match="all 2 calibration documents of domain 'd' are also"):
        run_one(unit(tmp_path, same, mode="drop"))
    assert run_one(unit(tmp_path, same))["overlap"]["d"]["identical"] == 2


def test_nothing_shared_is_nothing_to_say() -> None:
    counts = {"documents": 3, "tokens": 9, "identical": 0, "similar": 0, "shared_tokens": 0}

    assert warnings({"a": counts | {"dropped": True}}, 0.5) == []
