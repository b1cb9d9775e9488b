"""A run that recovers an encoder-decoder, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import Command, Inputs, write_jsonl
from tests.planted_families import planted_model

RECOVER: dict[str, Any] = {
    "mode": "experts",
    "steps": 6,
    "batch": 4,
    "warmup": 1,
    "learning_rate": 0.003,
    "teacher": {"shards": 2, "dtype": "float32"},
}


def test_several_ranks_are_refused(coalesce: Command, inputs: Inputs) -> None:
    planted_model("switch_transformers").save_pretrained(inputs.model)
    assert_refused(
        coalesce,
        inputs,
        inputs.recipe(recover=RECOVER | {"ranks": 2}),
        "experts that no token of a pass met",
        "set recover.ranks=1",
        overrides=("executor.kind=ray",),
    )


def test_a_teacher_of_another_kind_is_refused(coalesce: Command, inputs: Inputs) -> None:
    planted_model("switch_transformers").save_pretrained(inputs.root / "other")
    teacher = RECOVER["teacher"] | {"path": str(inputs.root / "other")}
    assert_refused(
        coalesce,
        inputs,
        inputs.recipe(recover=RECOVER | {"teacher": teacher}),
        "has an encoder, and reads half",
        "set recover.teacher.path",
    )


@pytest.mark.slow
def test_it_is_trained_and_measured(coalesce: Command, inputs: Inputs) -> None:
    planted_model("switch_transformers").save_pretrained(inputs.model)
    rows = [{"text": f"word{i} word{i + 1} word{i + 2}"} for i in range(20)]
    held = write_jsonl(inputs.root / "held.jsonl", rows)
    evaluate = {
        "data": {
            "sources": [{"path": str(held), "domain": "held"}],
            "tokens": 60,
            "sequence_length": 12,
        },
        "baselines": [],
        "kl_positions": 8,
    }
    ran = coalesce("run", inputs.recipe(recover=RECOVER, evaluate=evaluate))
    assert ran.code == 0, ran.err
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    assert report["recover"]["steps"] == 6
    assert report["recover"]["last"]["distillation"] < report["recover"]["first"]["distillation"]
    perplexity = report["perplexity"]
    assert perplexity["unrecovered"] != perplexity["compressed"]
