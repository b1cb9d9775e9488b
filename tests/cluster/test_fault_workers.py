"""A worker is killed in every stage of one run: the driver goes on, to the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cluster.faults import (
    Driver,
    Holds,
    bytes_of,
    command_of,
    environment,
    events,
    kill,
)
from tests.orchestrator.tiny_run import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(1800)]
# Files that a unit of each stage is writing when its worker is killed.
STAGES = {
    "verify": r"/verify/\.",
    "corpus": r"/calibration/\.tokens",
    "calibrate": r"/shards/\.shard-\d+\.arrow",
    "inputs": r"/calibration/inputs/\.",
    "subsample": r"/calibration/subsample/\.",
    "transform": r"/run/layers/\.",
    "export": r"/run/\.output\.[^/]+\.tmp/\.",
    "evaluate": r"/evaluation/compressed/\.",
}
# Those of a run that is narrowed by measured damage and refitted behind reduced layers.
REDUCED = {
    "probe": r"/run/probe/\.",
    "transform": r"/run/layers/\.rest",
    "carry": r"/refit/block-\d+/\.part-\d+\.safetensors\.",
    "transform again": r"/run/layers/\.layer",
}
REDUCTION = (
    "group={method: coalesce, multiple: 2, divide: probe, budget: {keep_ratio: 0.5}}",
    "export.format=mapped",
    "refit.target=sequential",
    "probe={ratios: [0.25, 0.5], tokens: 64, positions: 16}",
    "evaluate=null",
)


def test_a_worker_killed_in_each_stage_changes_no_byte(
    every_stage: Inputs, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    assert killed_in(STAGES, every_stage, tmp_path) == undisturbed


def test_a_worker_killed_while_layers_are_probed_and_refitted_changes_no_byte(
    every_stage: Inputs, tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed" / "run"
    with Driver(every_stage, undisturbed, ["executor.kind=local", *REDUCTION]) as driver:
        driver.succeed()
    assert killed_in(REDUCED, every_stage, tmp_path, *REDUCTION) == bytes_of(undisturbed)


def killed_in(
    stages: Mapping[str, str], inputs: Inputs, folder: Path, *overrides: str
) -> dict[str, str]:
    """Bytes of a run that lost a worker in each of these stages, in their order."""
    run_dir, holds = folder / "run", Holds(folder / "holds")
    for stage, pattern in stages.items():
        holds.want(stage, pattern)
    with Driver(inputs, run_dir, overrides, environment(holds.folder)) as driver:
        for stage in stages:
            worker = holds.taken(stage, driver)
            assert command_of(worker).startswith("ray::")
            assert events(run_dir, "stage_started")[-1]["stage"] == stage.split()[0]
            kill(worker)
        driver.succeed()
    assert len(events(run_dir, "run_started")) == 1
    assert not any(event.get("resumed") for event in events(run_dir, "unit_done"))
    assert not list(run_dir.rglob("*.tmp"))
    return bytes_of(run_dir)
