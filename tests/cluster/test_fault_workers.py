"""A worker is killed in every stage of one run: the driver goes on, to the same bytes."""

from __future__ import annotations

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

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(600)]
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


def test_a_worker_killed_in_each_stage_changes_no_byte(
    every_stage: Inputs, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir, holds = tmp_path / "run", Holds(tmp_path / "holds")
    for stage, pattern in STAGES.items():
        holds.want(stage, pattern)
    with Driver(every_stage, run_dir, env=environment(holds.folder)) as driver:
        for stage in STAGES:
            worker = holds.taken(stage, driver)
            assert command_of(worker).startswith("ray::")
            assert events(run_dir, "stage_started")[-1]["stage"] == stage
            kill(worker)
        driver.succeed()
    assert bytes_of(run_dir) == undisturbed
    assert len(events(run_dir, "run_started")) == 1
    assert not any(event.get("resumed") for event in events(run_dir, "unit_done"))
    assert not list(run_dir.rglob("*.tmp"))
