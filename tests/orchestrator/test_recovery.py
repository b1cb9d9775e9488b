"""A run with a section `recover`: trained, tried out, measured beside what was not trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.run_folder import RunFolder
from stages.recover.progress import read_course
from tests.orchestrator.tiny_run import (
    Command,
    Inputs,
    caller,
    private_cache,
    snapshot,
    write_inputs,
    write_jsonl,
)

pytestmark = pytest.mark.slow
STEPS = 6
RECOVER: dict[str, Any] = {
    "mode": "experts",
    "steps": STEPS,
    "batch": 4,
    "warmup": 1,
    "learning_rate": 0.005,
    "checkpoint_every": 4,
    "teacher": {"top": 8, "shards": 2, "dtype": "float32"},
}


@pytest.fixture
def inputs(tmp_path: Path) -> Iterator[Inputs]:
    made = write_inputs(tmp_path)
    write_jsonl(made.root / "held.jsonl", [{"text": f"word{i} word{i + 1}"} for i in range(30)])
    yield from private_cache(tmp_path / "cache", made)


@pytest.fixture
def coalesce(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return caller(monkeypatch, capfd)


def recipe(inputs: Inputs, **changes: Any) -> Path:
    evaluate = {
        "data": {
            "sources": [{"path": str(inputs.root / "held.jsonl"), "domain": "held"}],
            "tokens": 60,
            "sequence_length": 12,
        },
        "baselines": ["frequency"],
        "kl_positions": 8,
    }
    values = {"evaluate": evaluate, "recover": RECOVER, "calibrate__dtype": "float32"}
    return inputs.recipe(**(values | changes))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"export": {"format": "mapped"}, "compress": {"rank": 4, "sparse": 0.25, "multiple": 1}},
    ],
    ids=["native", "mapped, U V + S"],
)
def test_the_result_is_trained_and_both_are_measured(
    inputs: Inputs, coalesce: Command, form: dict[str, Any]
) -> None:
    made = recipe(inputs, **form)
    planned = coalesce("plan", made)
    assert planned.code == 0, planned.err
    assert "teach" in planned.out and f"{STEPS} steps of 4 blocks" in planned.out
    ran = coalesce("run", made)
    assert ran.code == 0, ran.err
    folder = RunFolder(inputs.run_dir)
    before, after = tensors(folder.unrecovered), tensors(folder.output("compressed"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".experts." in name for name in moved)
    assert not any("index" in name or "expert_map" in name for name in moved)
    config = "config.json"
    assert (folder.unrecovered / config).read_bytes() == (
        folder.root / "output" / config
    ).read_bytes()
    report = json.loads((folder.report / "report.json").read_text())
    assert report["perplexity"]["unrecovered"] != report["perplexity"]["compressed"]
    assert set(report["perplexity"]["baselines"]) == {"frequency"}
    assert report["recover"]["steps"] == STEPS
    card = (folder.root / "output" / "README.md").read_text()
    page = (folder.report / "index.html").read_text()
    assert "before recovery" in card and "before recovery" in page
    assert "WITHOUT recovery training" not in card
    assert [line["step"] for line in read_course(folder.recover / "course.jsonl")] == [
        *range(1, STEPS + 1)
    ]
    assert not list(folder.recover.glob("state-*")) and not folder.taught.exists()
    again = snapshot(inputs.run_dir / "output")
    assert coalesce("run", made).code == 0
    assert snapshot(inputs.run_dir / "output") == again
    assert coalesce("status", inputs.run_dir).code == 0


def test_a_resumed_run_with_another_section_is_refused(inputs: Inputs, coalesce: Command) -> None:
    assert coalesce("run", recipe(inputs, evaluate=None)).code == 0
    faster = RECOVER | {"micro_batch": 2, "checkpoint_every": 3}
    assert coalesce("run", recipe(inputs, evaluate=None, recover=faster)).code == 0
    refused = coalesce("run", recipe(inputs, evaluate=None, recover=RECOVER | {"steps": 7}))
    assert refused.code == 2 and "recover" in refused.err


def test_what_cannot_be_recovered_is_refused_before_any_work(
    inputs: Inputs, coalesce: Command
) -> None:
    def refused(**section: Any) -> str:
        found = coalesce("validate", recipe(inputs, evaluate=None, recover=RECOVER | section))
        assert found.code == 2, found.out
        assert not inputs.run_dir.exists()
        return found.err

    other = write_inputs(inputs.root / "other")
    teacher = RECOVER["teacher"] | {"path": str(other.model)}
    tokenizer = other.model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"word7"', '"words7"'))
    assert "another tokenizer" in refused(teacher=teacher)
    other.change_config(vocab_size=32)
    assert "predicts 32 tokens, the model has 64" in refused(teacher=teacher)
    assert "ranks" in refused(ranks=2)
    assert "batch" in refused(batch=3, ranks=2)
    assert "warmup" in refused(warmup=6)
