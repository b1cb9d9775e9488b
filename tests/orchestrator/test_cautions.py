"""The report names domains that lost much more than others, that decided nothing, or are shared."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report.cautions import (
    cautions,
    domain_rises,
    overlaps,
    uncalibrated,
    uneven,
    unfitted,
)
from stages.corpus.config import DedupConfig
from stages.unit import Done
from tests.orchestrator.tiny_run import WORDS, Command, Inputs, write_jsonl
from tests.tiny import PROPERTY

RISES = st.dictionaries(st.sampled_from("abcdef"), st.floats(-1, 3), max_size=6)


def perplexity(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {"original": {"domains": before}, "compressed": {"domains": after}}


def test_the_rise_is_in_nats_and_only_of_numbers() -> None:
    before = {"a": 10.0, "b": 20.0, "c": 5.0, "d": math.nan}
    after = {"a": 20.0, "b": math.inf, "d": 3.0}

    assert domain_rises(perplexity(before, after)) == {"a": pytest.approx(math.log(2))}
    assert domain_rises({}) == {}


def test_a_domain_that_lost_much_more_than_the_others_is_named_with_numbers() -> None:
    (line,) = uneven({"code": 1.25, "law": 0.2, "prose": 0.3, "verse": 0.25})

    assert line == (
        "the perplexity of code rose by +1.250 nats, that of the other domains by +0.250 (median)"
    )


@pytest.mark.parametrize(
    "rises",
    [
        {},
        {"a": 5.0},
        {"a": 0.4, "b": 0.3, "c": 0.25},
        {"a": 0.05, "b": 0.001, "c": 0.001},
        {"a": 0.04, "b": -0.05, "c": -0.05},
    ],
    ids=["none", "one", "alike", "all little", "little against better"],
)
def test_what_is_even_or_small_is_not_named(rises: dict[str, float]) -> None:
    assert uneven(rises) == []


@PROPERTY
@given(rises=RISES, shift=st.floats(0, 2))
def test_the_lowest_rise_is_never_named_and_a_far_higher_one_always(
    rises: dict[str, float], shift: float
) -> None:
    named = [line.split()[3] for line in uneven(rises)]
    far = uneven(rises | {"z": 2 * max([0.0, *map(abs, rises.values())]) + 0.2 + shift})

    assert not rises or min(rises, key=lambda name: rises[name]) not in named
    assert not rises or "z" in [line.split()[3] for line in far]


def test_domains_that_decided_nothing_are_named_worst_first() -> None:
    rises = {"code": 1.5, "law": 2.0, "prose": 0.1, "verse": 0.3}

    (line,) = uncalibrated(rises, ["prose", "verse"], None)
    (tasked,) = uncalibrated(rises, list(rises), {"prose": 1.0, "law": 0.0})

    assert line.startswith("not calibrated on, rise of the log-perplexity in nats: law (+2.000)")
    assert line.endswith("code (+1.500); calibrated domains: +0.200 (median)")
    assert "law (+2.000), code (+1.500), verse (+0.300); calibrated domains: +0.100" in tasked
    assert uncalibrated(rises, list(rises), None) == []


def test_hundreds_of_domains_make_one_line() -> None:
    rises = {f"d{i:03}": i / 100 for i in range(300)}

    (line,) = uncalibrated(rises, [], None)

    assert line.endswith("d288 (+2.880), 288 more")


def test_shared_text_comes_from_the_corpus_unit() -> None:
    counts = {
        "documents": 4,
        "tokens": 90,
        "identical": 1,
        "similar": 1,
        "shared_tokens": 40,
        "dropped": False,
    }
    units = [
        Done("corpus/evaluation", {"tokens": {}}, {}, 0.0, 0),
        Done("corpus/calibration", {"overlap": {"law": counts}}, {}, 0.0, 0),
    ]

    shared = overlaps(units)

    assert shared == {"law": counts}
    (line,) = cautions({}, ["law"], None, shared, DedupConfig(), {})
    assert line.startswith("calibration text of law: 2 of 4 documents (40 of 90 tokens)")
    assert overlaps(units[:1]) == {}


def test_a_refit_with_too_few_tokens_and_one_that_was_not_made_are_named() -> None:
    refit: dict[str, Any] = {
        "0": {"strength": 0.1, "tokens_per_unknown": 0.5},
        "1": {"strength": None, "tokens_per_unknown": 0.75},
        "3": {"strength": 0.01, "tokens_per_unknown": 12.0},
    }

    scarce, left = unfitted(refit)

    assert scarce.startswith("layers [0, 1]: the refit had fewer tokens than unknowns (0.5 for")
    assert left.startswith("layers [1]: the closed-form refit was not made")
    assert unfitted({"3": refit["3"]}) == []


def recipe(inputs: Inputs, **dedup: Any) -> Path:
    """Calibrated on prose alone, measured on it and on another domain; two texts are in both."""
    generator = random.Random(0)
    texts = [" ".join(generator.sample(WORDS, 60)) for _ in range(40)]
    write_jsonl(inputs.text, [{"text": text} for text in texts[:30]])
    held = [{"text": text, "domain": "prose"} for text in texts[28:34]]
    held += [{"text": text, "domain": "other"} for text in texts[34:]]
    path = write_jsonl(inputs.root / "held.jsonl", held)
    data = {"sources": [{"path": str(path), "domain_column": "domain"}], "tokens": 1024}
    return inputs.recipe(
        calibrate__data__tokens=2048,
        evaluate={"data": data | {"sequence_length": 16}, "baselines": [], "kl_positions": 0},
        calibrate__dedup=dedup,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["warn", "drop"])
def test_a_run_on_one_domain_says_so_in_report_events_and_terminal(
    coalesce: Command, inputs: Inputs, mode: str
) -> None:
    outcome = coalesce("run", recipe(inputs, mode=mode))

    assert outcome.code == 0, outcome.err
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    found = [line for line in report["warnings"] if line.startswith("not calibrated on")]
    assert len(found) == 1 and "other (" in found[0] and "prose (" not in found[0]
    assert found[0] in outcome.out
    shared = report["overlap"]["prose"]
    assert (shared["documents"], shared["identical"], shared["similar"]) == (30, 2, 0)
    assert shared["dropped"] is (mode == "drop")
    assert report["tokens"]["calibration"] == 61 * (28 if mode == "drop" else 30)
    assert any("are also evaluated" in line for line in report["warnings"])
    events = (inputs.run_dir / "events.jsonl").read_text()
    assert all(json.dumps(line)[1:-1] in events for line in found)
    page = (inputs.run_dir / "report" / "index.html").read_text()
    assert "not calibrated on" in page
