"""Merged experts as U V + S through the whole job: planned to the byte, resumed, refused early."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from models.mapped.registration import register
from orchestrator.load import load
from orchestrator.preflight import expected_decisions, expected_layouts, prepare
from tests.orchestrator.tiny_run import Command, Inputs
from tests.tiny import logits_of, random_ids

SMALL = {"export__format": "mapped", "compress": {"rank": 4, "sparse": 0.1}}


def weights_of(inputs: Inputs) -> int:
    return sum(path.stat().st_size for path in (inputs.run_dir / "output").glob("*.safetensors"))


def report_of(inputs: Inputs) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "fitted"),
    [
        ({}, False),
        ({"compress": {"rank": 4, "importance": "activations", "whiten": True}}, False),
        ({"compress": {"ratio": 0.3, "axis": "columns"}, "refit__enabled": True}, True),
    ],
    ids=["weights", "activations", "refit"],
)
def test_the_output_has_the_planned_bytes_and_opens(
    coalesce: Command, inputs: Inputs, changes: dict[str, Any], fitted: bool
) -> None:
    recipe = inputs.recipe(**(SMALL | changes))
    run = prepare(load(str(recipe)).config)
    predicted = sum(each.file_bytes for each in expected_layouts(run.variants[0], run.moe))

    outcome = coalesce("run", recipe, "--quiet")

    assert outcome.code == 0, outcome.err
    assert weights_of(inputs) == predicted
    marker = json.loads((inputs.run_dir / "layers" / "layer-00000.safetensors.json").read_text())
    errors = marker["result"]["compress_error"]
    assert set(errors) == {"gate", "up", "down"} and all(0 < e < 1 for e in errors.values())
    solved = marker["result"].get("second_factor")
    assert (solved is not None) == fitted
    if solved:
        assert solved["after"] <= solved["before"]
    assert report_of(inputs)["method"]["config"]["compress"]["sparse"] == 0.1
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs.run_dir / "output")
    assert logits_of(model, random_ids(2, 6)).isfinite().all()


@pytest.mark.slow
def test_a_second_run_does_nothing_and_another_rank_is_refused(
    coalesce: Command, inputs: Inputs
) -> None:
    coalesce("run", inputs.recipe(**SMALL), "--quiet")
    stamps = {p: p.stat().st_mtime_ns for p in inputs.run_dir.glob("layers/*")}

    again = coalesce("run", inputs.recipe(**SMALL), "--quiet")
    other = coalesce("run", inputs.recipe(**SMALL | {"compress": {"rank": 5}}), "--quiet")

    assert again.code == 0 and stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert other.code != 0 and "compress" in other.err


@pytest.mark.slow
def test_native_output_is_the_same_function_written_out(coalesce: Command, inputs: Inputs) -> None:
    """Every expert is kept, so that the native router chooses as the mapped one does."""
    keep: dict[str, Any] = {"group__budget": {"keep_ratio": 1.0}}
    outcome = coalesce("run", inputs.recipe(**SMALL, **keep), "--quiet")
    assert outcome.code == 0, outcome.err
    plain = {"export__format": "native", "run_dir": str(inputs.root / "plain")}
    assert coalesce("run", inputs.recipe(**(SMALL | keep | plain)), "--quiet").code == 0

    register()
    opened = [
        transformers.AutoModelForCausalLM.from_pretrained(folder / "output")
        for folder in (inputs.run_dir, inputs.root / "plain")
    ]

    assert type(opened[1]) is transformers.MixtralForCausalLM
    small, whole = (logits_of(model, random_ids(3, 9, vocabulary=60)) for model in opened)
    torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"compress": {"rank": 17}}, "projections of layer 0 are 16 x 32 and have at most rank 16"),
        ({"compress": {"rank": 4, "sparse": 1.0}}, "hold 704 values, the projection itself 512"),
        ({"compress": {"rank": 4, "sparse": 1.5}}, "less than or equal to 1"),
        ({"compress": {"sparse": 0.1}}, "give either rank"),
        ({"compress": {"rank": 4, "skip_layers": [7]}}, "compress.skip_layers names [7]"),
        (
            {"compress": {"rank": 4, "whiten": True}, "calibrate__sample": None},
            "compress needs a sample of what enters the layers",
        ),
        ({"export__compress": {"rank": 4}}, "write the section `compress` beside `export`"),
        (
            {"group": {"method": "coalesce", "budget": {"target_bytes": 90_000}}},
            "how many neurons that leaves is not known",
        ),
    ],
    ids=["rank", "all of S", "share", "no rank", "layer", "no sample", "place", "budget"],
)
def test_what_cannot_be_decomposed_is_refused_before_anything_is_written(
    coalesce: Command, inputs: Inputs, changes: dict[str, Any], cause: str
) -> None:
    outcome = coalesce("run", inputs.recipe(**(SMALL | changes)), "--quiet")

    assert outcome.code not in (0, None) and cause in " ".join(outcome.err.split())
    assert not inputs.run_dir.exists()


@pytest.mark.slow
def test_skipped_layers_stay_whole_and_no_s_is_possible(coalesce: Command, inputs: Inputs) -> None:
    compress = {"rank": 4, "sparse": 0.0, "skip_layers": [0]}
    outcome = coalesce("run", inputs.recipe(**(SMALL | {"compress": compress})), "--quiet")

    assert outcome.code == 0, outcome.err
    config = json.loads((inputs.run_dir / "output" / "config.json").read_text())
    assert config["expert_factors"] == {"1": {f"{n}_proj": [4, 0] for n in ("gate", "up", "down")}}


def test_a_budget_in_bytes_counts_the_factors(inputs: Inputs) -> None:
    """More experts fit when each of them is smaller."""
    kept = []
    for section in (None, {"rank": 4, "sparse": 0.1}):
        changes = SMALL | {"group__budget": {"target_bytes": 70_000}, "compress": section}
        run = prepare(load(str(inputs.recipe(**changes))).config)
        layouts = expected_layouts(run.variants[0], run.moe)
        assert sum(each.file_bytes for each in layouts) <= 70_000
        kept.append(
            sum(len(d.representatives) for d in expected_decisions(run.variants[0], run.moe))
        )
    assert kept[0] < kept[1]


def test_baselines_are_pruned_to_the_bytes_of_the_factors(inputs: Inputs) -> None:
    text = {"sources": [{"path": str(inputs.text)}], "tokens": 256, "sequence_length": 16}
    evaluate = {"data": text, "baselines": ["frequency"]}
    section = {"rank": 7, "sparse": 0.0}
    changes = {"export__format": "mapped", "compress": section, "evaluate": evaluate}
    keep = {"group__budget": {"keep_ratio": 1.0}}
    run = prepare(load(str(inputs.recipe(**(changes | keep)))).config)

    sizes = [sum(each.file_bytes for each in expected_layouts(v, run.moe)) for v in run.variants]

    assert run.variants[1].export.compress is None
    assert len(expected_decisions(run.variants[0], run.moe)[0].representatives) == 8
    assert len(expected_decisions(run.variants[1], run.moe)[0].representatives) < 8
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
