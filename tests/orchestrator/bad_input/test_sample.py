"""Samples and statistics that are too small for what is asked of them: named, and survived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from orchestrator.load import load
from orchestrator.preflight import prepare
from stages.errors import StatisticsError
from tests.orchestrator.bad_input.test_unused_expert import close_expert
from tests.orchestrator.tiny_run import Command, Inputs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["coalesce", "mc_smoe"])
def test_fewer_tokens_than_unknowns_and_an_unused_expert_are_named_and_survived(
    coalesce: Command, inputs: Inputs, method: str
) -> None:
    """48 sampled tokens; down projections have 4 experts x 16 or 8 x 8 unknown rows."""
    inputs.change_weights(close_expert)
    recipe = inputs.recipe(
        group={"method": method}, refit__enabled=True, align__by="both", merge__weights="uniform"
    )

    outcome = coalesce("run", recipe)

    assert outcome.code == 0, outcome.err
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    scarce = [line for line in report["warnings"] if "fewer tokens than unknowns" in line]
    assert len(scarce) == 1 and scarce[0].startswith("layers [0, 1]: the refit had fewer tokens")
    assert "(0.75 for each at least)" in scarce[0]
    assert any("experts [6] received none" in line for line in report["warnings"])
    for each in report["refit"].values():
        assert each["held_out_after"] <= each["held_out_before"]


def test_a_task_that_given_statistics_do_not_know_is_refused(
    finished: Inputs, tmp_path: Path
) -> None:
    values = yaml.safe_load(finished.recipe().read_text())
    values["run_dir"] = str(tmp_path / "run")
    values["calibrate"]["statistics"] = str(finished.run_dir / "statistics.arrow")
    values["group"]["task"] = {"prose": 1, "latin": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))

    with pytest.raises(StatisticsError, match=r"task names latin.*has the domains prose"):
        prepare(load(str(tmp_path / "recipe.yaml")).config)
