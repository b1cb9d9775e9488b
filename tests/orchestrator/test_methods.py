"""Every method decides on what one real run observed; what it would lack is refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from models.arrow import read_table
from orchestrator.load import load
from orchestrator.needs import attached
from orchestrator.preflight import Prepared, prepare
from orchestrator.run import run
from orchestrator.run_folder import MAIN, RunFolder
from stages.calibrate.statistics import read_statistics
from stages.export.layout import sizes
from stages.group.decision import from_table
from stages.group.methods import DECIDE
from stages.group.stage import decide
from stages.group.task import task_layers
from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import EXPERTS, LAYERS, Command, Inputs


def again(finished: Inputs, folder: Path, **changes: Any) -> Prepared:
    """Another decision on what the finished run observed."""
    recipe = yaml.safe_load(finished.recipe().read_text())
    recipe["run_dir"] = str(folder / "run")
    recipe["calibrate"]["statistics"] = str(finished.run_dir / "statistics.arrow")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
    return prepare(load(str(folder / "recipe.yaml")).config)


@pytest.mark.parametrize("method", DECIDE)
def test_every_method_decides_on_one_observation(
    finished: Inputs, tmp_path: Path, method: str
) -> None:
    group = {"method": method, "budget": {"experts_per_layer": 3}, "task": {"prose": 1}}
    job = again(finished, tmp_path, group=group)
    table = read_statistics(finished.run_dir / "statistics.arrow")

    given = attached(
        job.config, job.config.group, task_layers(table, {"prose": 1}), job.folder, job.moe
    )
    found = decide(job.config.group, given, sizes(job.moe, job.config.export))

    assert [each.layer for each in found] == list(range(LAYERS))
    assert [len(each.representatives) for each in found] == [3] * LAYERS
    assert all(("drop" in actions(each)) <= job.config.group.may_drop for each in found)
    assert all(("merge" in actions(each)) <= (not job.config.group.prunes) for each in found)
    assert {
        "subsample": given[0].subsample is not None,
        "router": given[0].router is not None,
        "weights": given[0].weights is not None,
    } == {need: need in job.config.group.needs for need in ("subsample", "router", "weights")}


def actions(decision: Any) -> set[str]:
    return {decision.action(expert) for expert in range(EXPERTS)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "form"), [("ream", "mapped"), ("merge_moe", "native"), ("naee", "native")]
)
def test_a_run_writes_what_the_method_decided(
    finished: Inputs, tmp_path: Path, method: str, form: str
) -> None:
    job = again(
        finished,
        tmp_path,
        group={"method": method, "protect_super_experts": True},
        merge={"weights": "alpha"},
        align={"reference": "highest_saliency"},
        export={"format": form},
    )
    run(job)

    found = from_table(read_table(job.folder.decision(MAIN)))
    report = json.loads((job.folder.report / "report.json").read_text())
    assert report["experts"]["after"] == {str(n): EXPERTS // 2 for n in range(LAYERS)}
    assert any("super experts" in line for line in report["warnings"])
    for each in found:
        for members in each.members:
            if method != "naee" and len(members) > 1:
                assert sum(each.weight[m] for m in members) == pytest.approx(1)
    saliency = read_statistics(finished.run_dir / "statistics.arrow")
    score = np.array(saliency["gate_norm"]) / np.maximum(np.array(saliency["selected"]), 1)
    for each in found:
        for representative, members in zip(each.representatives, each.members, strict=True):
            layer = score[each.layer * EXPERTS : (each.layer + 1) * EXPERTS]
            assert layer[representative] == max(layer[list(members)])


SAMPLED: dict[str, dict[str, Any]] = {
    "align-activations": {"align": {"by": "activations"}},
    "align-both": {"align": {"by": "both"}},
    "merge-neurons": {"merge": {"by": "neurons"}},
    "router-least-squares": {"export": {"router": "least_squares"}},
    "router-reinit": {"export": {"router": "reinit"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_a_run_merges_by_its_sample_and_continues(
    finished: Inputs, tmp_path: Path, name: str
) -> None:
    """On the sample that an earlier run took; a second call finds every layer done."""
    group = {"method": "mc_smoe"}
    job = again(finished, tmp_path, group=group, **SAMPLED[name])
    run(job)
    layers = [path.read_bytes() for path in sorted(job.folder.layers(MAIN).glob("*.safetensors"))]
    plain = sorted(RunFolder(finished.run_dir).layers(MAIN).glob("*.safetensors"))

    run(prepare(job.config))

    again_made = sorted(job.folder.layers(MAIN).glob("*.safetensors"))
    assert [path.read_bytes() for path in again_made] == layers
    warnings = json.loads((job.folder.report / "report.json").read_text())["warnings"]
    assert any("choose at random" in line for line in warnings) == name.endswith("reinit")
    assert len(plain) == len(layers)
    assert [path.read_bytes() for path in plain] != layers


OFF = "calibrate.sample=null"
REFUSALS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "a method without its sample": (
        ("group={method: hc_smoe}", OFF),
        ["hc_smoe needs the outputs of all experts", "calibrate.sample.tokens"],
    ),
    "weights without their sample": (
        ("merge.weights=alpha", OFF),
        ["merge.weights=alpha needs the outputs", "calibrate.sample.statistics=true"],
    ),
    "an unknown domain": (
        ("group.task={latin: 1}",),
        ["task names latin", "has the domains prose", "group.task"],
    ),
    "too many subsets": (
        ("group={method: naee, max_subsets: 60}",),
        ["4 of 8 experts can be chosen in 70 ways", "group.max_subsets"],
    ),
    "groups that are too small": (
        ("group={method: ream, group_size: 1}",),
        ["4 groups of 1 cannot hold 8 experts", "2 or more"],
    ),
    "alignment without its sample": (
        ("align.by=both", OFF),
        ["align.by=both needs a sample of what enters the layers", "align.by=weights"],
    ),
    "neurons without their sample": (
        ("merge.by=neurons", OFF),
        ["merge.by=neurons needs a sample of what enters the layers", "merge.by=weights"],
    ),
    "dropping in a format that cannot": (
        ("group={method: mixed}", "export={format: mapped}"),
        ["mapped"],
    ),
    "pairs that cannot hold all experts": (
        ("group={method: mixed, drop: false, budget: {experts_per_layer: 3}}",),
        ["3 groups of 2 cannot hold 8 experts", "group.drop=true"],
    ),
    "a router without its sample": (
        ("export.router=least_squares", OFF),
        ["export.router=least_squares needs a sample", "export.router=mean"],
    ),
    "a router that the format keeps": (
        ("export={format: mapped, router: mean}",),
        ["router=mean needs format=native: mapped keeps the router as it is"],
    ),
    "a refit without its sample": (
        ("refit.enabled=true", OFF),
        ["refit.enabled=true needs a sample", "refit.enabled=auto"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_an_observation_cannot_give_is_refused_before_it_begins(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    overrides, fragments = REFUSALS[name]

    assert_refused(coalesce, inputs, inputs.recipe(), *fragments, overrides=overrides)
