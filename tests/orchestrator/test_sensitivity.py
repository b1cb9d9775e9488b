"""Rows of S that go by sensitivity in a run: bytes, what stays beside it, kills, refusals."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from models.mapped.registration import register
from orchestrator.load import load
from orchestrator.run_folder import RunFolder
from stages.recover.api import recover
from stages.recover.progress import read_course
from tests.orchestrator.test_recovery import RECOVER, recipe, tensors
from tests.orchestrator.test_recovery_stops import await_step, start
from tests.orchestrator.tiny_run import Command, Inputs, snapshot, write_jsonl
from tests.tiny import logits_of, random_ids

COMPRESS: dict[str, Any] = {
    "rank": 4,
    "sparse": 0.25,
    "multiple": 1,
    "importance": "sensitivity",
    "one_shot": "activations",
}
SMALL: dict[str, Any] = {"export": {"format": "mapped"}, "compress": COMPRESS}
STEPS = 100
# Of [K, n, width] in every layer: a quarter of 16 and of 32 rows.
EVEN = {"gate_proj": [4, 4], "up_proj": [4, 4], "down_proj": [4, 8]}


@pytest.fixture(autouse=True)
def held(inputs: Inputs) -> Path:
    """Text to measure on."""
    rows = [{"text": f"word{i} word{i + 1}"} for i in range(30)]
    return write_jsonl(inputs.root / "held.jsonl", rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("threshold", ["layer", "global"])
def test_a_run_ends_with_the_rows_that_training_chose(
    inputs: Inputs, coalesce: Command, threshold: str
) -> None:
    measured = threshold == "layer"
    section = COMPRESS | {"threshold": threshold, "axis": "rows" if measured else "columns"}
    changes = {"compress": section, "recover": RECOVER | {"alpha": 0}}
    more = {"evaluate__baselines": []} if measured else {"evaluate": None}
    made = recipe(inputs, **SMALL | changes | more)
    planned = coalesce("plan", made)
    assert planned.code == 0 and "go by sensitivity after steps 0 to 6" in " ".join(
        planned.out.split()
    )
    ran = coalesce("run", made, "--quiet")
    assert ran.code == 0, ran.err

    folder = RunFolder(inputs.run_dir)
    before, after = folder.unrecovered, folder.output("compressed")
    factors = json.loads((after / "config.json").read_text())["expert_factors"]
    once = json.loads((before / "config.json").read_text())["expert_factors"]
    if threshold == "layer":
        assert factors == once == {"0": EVEN, "1": EVEN}
    else:
        assert factors != once
    chosen, first = tensors(after), tensors(before)
    names = [name for name in first if name.endswith(".index") and name in chosen]
    assert any(not torch.equal(chosen[name], first[name]) for name in names)
    assert_stored_whole(after, factors)
    report = json.loads((folder.report / "report.json").read_text())
    if measured:
        quality = report["perplexity"]
        assert quality["unrecovered"]["overall"] != quality["compressed"]["overall"]
    assert weights(after) == report["bytes"]["after"] == report["bytes"]["predicted"]
    assert abs(weights(after) - weights(before)) < 4 * 40 * 4 + 64  # a row in 4 experts, digits
    assert len(list(folder.start.glob("*.safetensors"))) == 2
    assert not (folder.start / "student").exists()
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(after)
    assert logits_of(model, random_ids(2, 6)).isfinite().all()
    kept = snapshot(inputs.run_dir / "output")
    assert coalesce("run", made, "--quiet").code == 0
    assert snapshot(inputs.run_dir / "output") == kept


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def assert_stored_whole(folder: Path, factors: dict[str, dict[str, list[int]]]) -> None:
    """Every S has as many rows as config.json says, none of them zero, each at its own place."""
    found = tensors(folder)
    for layer, each in factors.items():
        for matrix, (rank, rows) in each.items():
            base = f"model.layers.{layer}.mlp.experts.{matrix}"
            assert found[f"{base}.u"].shape[-1] == rank
            assert (f"{base}.s" in found) == bool(rows)
            if rows:
                assert found[f"{base}.index"].shape == found[f"{base}.s"].shape[:2] == (4, rows)
                assert bool((found[f"{base}.index"].diff(dim=1) > 0).all())
                assert bool(found[f"{base}.s"].any(dim=2).all())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_training_it_ends_in_the_bytes_of_an_undisturbed_run(inputs: Inputs) -> None:
    training = RECOVER | {"steps": STEPS, "checkpoint_every": 10, "alpha": 0}
    changes = SMALL | {"recover": training, "evaluate": None}
    made, folder = recipe(inputs, **changes), RunFolder(inputs.run_dir)
    killed = start(made)
    await_step(killed, made, folder, 35)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    assert not folder.output("compressed").exists()
    states = sorted(folder.recover.glob("state-*.safetensors"))
    assert any(name.startswith("more/") for name in load_file(states[-1]))
    student = inputs.root / "student"
    shutil.copytree(folder.start / "student", student)  # it does not stay
    assert start(made).wait(timeout=300) == 0
    assert len(read_course(folder.recover / "course.jsonl")) == STEPS
    assert not (folder.start / "student").exists()
    given = load(str(made)).config
    assert given.recover is not None
    undisturbed = inputs.root / "undisturbed" / "output"
    recover(student, undisturbed, given.recover, folder.recover_tokens, prune=given.pruning)
    found, expected = tensors(folder.output("compressed")), tensors(undisturbed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"recover": None}, "there is no section `recover`: add one, or set compress.importance"),
        ({"recover": RECOVER | {"mode": "router"}}, "needs recover.mode=experts or full"),
        ({"export": {"format": "native"}}, "needs export.format=mapped"),
        ({"compress": COMPRESS | {"sparse": 0.0}}, "needs compress.sparse above 0"),
        ({"compress": COMPRESS | {"sparse": 1.0}}, "lower compress.rank (or ratio) or compress"),
        (
            {
                "recover": RECOVER | {"deepspeed": {"zero_stage": 3}},
                "executor": {"kind": "ray"},
            },
            "needs recover.deepspeed.zero_stage 0, 1 or 2",
        ),
        (
            {"recover": RECOVER | {"prune": {"warmup": 4, "final": 3}}},
            "4 + 3 steps do not fit into 6",
        ),
        (
            {"compress": {"rank": 4}, "recover": RECOVER | {"prune": {"beta": 0.5}}},
            "recover.prune belongs to compress.importance=sensitivity",
        ),
        (
            {"compress": COMPRESS | {"importance": "weights"}},
            "one_shot=activations belongs to importance=sensitivity",
        ),
        ({"calibrate__sample": None}, "compress needs a sample of what enters the layers"),
    ],
    ids=[
        "no training",
        "routers alone",
        "native",
        "no rows",
        "all rows",
        "zero 3",
        "schedule",
        "schedule of nothing",
        "one shot of nothing",
        "no sample",
    ],
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_written(
    inputs: Inputs, coalesce: Command, changes: dict[str, Any], cause: str
) -> None:
    made = recipe(inputs, **SMALL | {"evaluate": None} | changes)
    outcome = coalesce("run", made, "--quiet")
    assert outcome.code == 2 and cause in " ".join(outcome.err.split()), outcome.err
    assert not inputs.run_dir.exists()
