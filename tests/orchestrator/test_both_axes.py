"""One budget for fewer and for narrower experts: `group.experts` of the method `coalesce`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from models.arrow import read_table
from orchestrator.load import load
from orchestrator.preflight import Prepared, expected_decisions, expected_layouts, prepare
from stages.group.decision import from_table
from stages.group.predict import predicted_error
from stages.subsample.read import SubsampleStatistics
from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import EXPERTS, INTERMEDIATE, LAYERS, Command, Inputs

KEPT = 6


def group(**more: Any) -> dict[str, Any]:
    budget = more.pop("budget", {"keep_ratio": 0.5})
    return {"method": "coalesce", "multiple": 4, "experts": KEPT, "budget": budget} | more


def recipe(inputs: Inputs, **more: Any) -> Any:
    return inputs.recipe(group=group(**more), refit={"polish": {"steps": 2}})


def test_the_output_has_fewer_and_wider_experts_and_the_bytes_that_were_promised(
    inputs: Inputs, coalesce: Command
) -> None:
    done = coalesce("run", recipe(inputs), "--quiet")

    assert done.code == 0, done.err
    config = json.loads((inputs.run_dir / "output" / "config.json").read_text())
    # Half of 8 x 16 neurons for 6 experts are 10.7 each, in fours.
    assert (config["num_local_experts"], config["intermediate_size"]) == (KEPT, 8)
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    assert report["bytes"]["after"] == report["bytes"]["predicted"]
    model = AutoModelForCausalLM.from_pretrained(inputs.run_dir / "output")
    assert model.config.num_local_experts == KEPT
    decisions = from_table(read_table(inputs.run_dir / "decision.arrow"))
    for layer, decision in enumerate(decisions):
        assert decision.width == 8 and len(decision.representatives) == KEPT
        assert sum(each is None for each in decision.group) == EXPERTS - KEPT
        path = inputs.run_dir / "calibration" / "subsample" / f"layer-{layer:05d}.arrow"
        sums = SubsampleStatistics.read(path).summed()
        least = _least_missed(sums)
        assert {e for e, each in enumerate(decision.group) if each is None} == least
        assert predicted_error(sums, decision) > 0


def _least_missed(sums: Any) -> set[int]:
    """Dropped one after another: what the sum of the dropped ones' outputs grows by least."""
    gone: list[int] = []
    while len(gone) < EXPERTS - KEPT:
        left = [e for e in range(EXPERTS) if e not in gone]

        def energy(expert: int) -> float:
            ids = [*gone, expert]
            return float(sum(sums["gated_gram"][a, b] for a in ids for b in ids))

        gone.append(min(left, key=energy))
    return set(gone)


@pytest.mark.parametrize("kept", [2, 5, KEPT, EXPERTS])
def test_a_budget_in_bytes_is_used_up_by_any_number_of_experts(inputs: Inputs, kept: int) -> None:
    size = 90_000
    words = [f"group.budget={{target_bytes: {size}}}", f"group.experts={kept}", "group.multiple=4"]
    run = prepare(load(str(recipe(inputs)), words).config)
    variant = run.variants[0]
    promised = sum(each.file_bytes for each in expected_layouts(variant, run.moe))
    assert promised <= size
    one_more = 4 * kept * LAYERS * 3 * 32 * run.moe.meta_expert(0).down.element_size()
    assert _width(run) == INTERMEDIATE or promised + one_more > size


def _width(run: Prepared) -> int | None:
    return expected_decisions(run.variants[0], run.moe)[0].width


def test_all_experts_are_the_method_without_the_setting(inputs: Inputs) -> None:
    words = [f"group.experts={EXPERTS}"]
    asked, plain = (
        prepare(load(str(recipe(inputs)), more).config) for more in (words, ["group.experts=null"])
    )
    layouts = [expected_layouts(run.variants[0], run.moe) for run in (asked, plain)]
    assert layouts[0] == layouts[1]


def test_a_sweep_compares_both_axes_at_equal_bytes(inputs: Inputs, coalesce: Command) -> None:
    methods = [{"method": "coalesce", "multiple": 4, "experts": kept} for kept in (4, 6, 8)]
    done = coalesce("sweep", inputs.recipe(sweep={"methods": methods, "ratios": [0.5]}), "--quiet")
    assert done.code == 0, done.err
    points = json.loads((inputs.run_dir / "sweep.json").read_text())["points"]
    shapes = [(p["experts"]["0"], p["width"].get("0", INTERMEDIATE)) for p in points]
    assert shapes == [(4, 16), (6, 8), (8, 8)]
    assert all(p["predicted_error"]["mean"] > 0 and p["format"] == "native" for p in points)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"group": group(experts=9)}, ["group.experts=9", "a layer has 8"]),
        ({"group": group(experts=1)}, ["1 experts per layer are fewer than the 2"]),
        ({"group": group(divide="probe")}, ["experts goes with one width for all layers"]),
        ({"group": group(), "export": {"format": "mapped"}}, ["mapped"]),
        (
            {"group": group(), "calibrate__sample": {"tokens": 48, "statistics": False}},
            ["group.experts needs the outputs of all experts"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    inputs: Inputs, coalesce: Command, more: dict[str, Any], words: list[str]
) -> None:
    assert_refused(coalesce, inputs, inputs.recipe(**more), *words)
