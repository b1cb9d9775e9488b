"""A budget divided between layers by what each width costs each of them, in a whole run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.arrow import read_table
from orchestrator.load import load
from orchestrator.pipeline import probe_units
from orchestrator.preflight import prepare
from orchestrator.run import run
from stages.group.decision import from_table
from stages.probe.config import ProbeConfig
from tests.orchestrator.tiny_run import INTERMEDIATE, LAYERS, Command, Inputs, snapshot


def changes(divide: str, **more: Any) -> dict[str, Any]:
    group = {"method": "coalesce", "multiple": 2, "divide": divide, "budget": {"keep_ratio": 0.5}}
    return {
        "group": group,
        "export": {"format": "mapped"},
        "refit": {"polish": {"steps": 2}},
    } | more


def widths(folder: Path) -> list[int]:
    return [each.width or 0 for each in from_table(read_table(folder / "decision.arrow"))]


@pytest.mark.slow
@pytest.mark.parametrize("divide", ["probe", "predicted"])
def test_the_budget_is_used_up_and_the_output_opens(
    divide: str, inputs: Inputs, coalesce: Command
) -> None:
    probe = {"ratios": [0.25, 0.5, 0.75], "tokens": 128, "positions": 64}
    recipe = inputs.recipe(**changes(divide, probe=probe))
    done = coalesce("run", recipe, "--quiet")

    assert done.code == 0, done.err
    found = widths(inputs.run_dir)
    assert sum(found) == LAYERS * INTERMEDIATE // 2 and min(found) >= 2
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    assert report["bytes"]["after"] == report["bytes"]["predicted"]
    files = sorted(path.name for path in (inputs.run_dir / "probe").glob("*.arrow"))
    if divide == "predicted":
        assert not files
        return
    assert files == [f"layer-{layer:05d}.arrow" for layer in range(LAYERS)]
    for layer in range(LAYERS):
        rows = read_table(inputs.run_dir / "probe" / files[layer]).to_pylist()
        assert [row["width"] for row in rows] == [4, 8, 12]
        assert rows[0]["kl"] > rows[2]["kl"] > 0 and rows[0]["positions"] == 64
    # Sizes that are tried without refit hold out the same text.
    job = prepare(load(str(recipe)).config)
    bare = job.config.model_copy(update={"probe": ProbeConfig(ratios=(0.5,), refit=False)})
    tried, plain = (
        [size.refit for unit in probe_units(each) for size in unit.sizes]
        for each in (job, replace(job, config=bare))
    )
    assert all(each.enabled is True for each in tried) and len(plain) == LAYERS
    assert all(not each.enabled and each.held_out == tried[0].held_out for each in plain)
    # A run that is repeated, and one that was interrupted before it decided, end the same.
    before = snapshot(inputs.run_dir / "output")
    for part in ("decision.arrow", "decision.arrow.json"):
        (inputs.run_dir / part).unlink()
    shutil.rmtree(inputs.run_dir / "probe")
    run(prepare(load(str(recipe)).config))
    assert snapshot(inputs.run_dir / "output") == before


@pytest.mark.parametrize(
    ("divide", "words", "message"),
    [
        ("probe", ("export.format=native",), "its own width, which the native format cannot hold"),
        ("predicted", ("calibrate.sample.statistics=false",), "group.divide=predicted needs"),
    ],
)
def test_what_cannot_be_is_refused(
    divide: str, words: tuple[str, ...], message: str, inputs: Inputs, coalesce: Command
) -> None:
    done = coalesce("run", inputs.recipe(**changes(divide)), *words)
    assert done.code == 2 and message in done.err
    assert not inputs.run_dir.exists()
