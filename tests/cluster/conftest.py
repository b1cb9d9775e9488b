"""The tiny run of the command-line tests, for tests on clusters."""

from __future__ import annotations

import shutil

import pytest

from tests.cluster.faults import SHORT, Driver, bytes_of, whole
from tests.orchestrator.conftest import coalesce, inputs, pristine
from tests.orchestrator.tiny_run import Inputs

__all__ = ["coalesce", "inputs", "pristine"]


@pytest.fixture(scope="session")
def every_stage(pristine: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Inputs and a recipe that several tests share: their runs are the same but for the folder."""
    root = tmp_path_factory.mktemp("every") / "inputs"
    shutil.copytree(pristine.root, root)
    whole(Inputs(root))
    return Inputs(root)


@pytest.fixture(scope="session")
def undisturbed(every_stage: Inputs) -> dict[str, str]:
    """Bytes of that run in one process; all are called `run`, since the model card has the name."""
    return _undisturbed(every_stage)


@pytest.fixture(scope="session")
def short_undisturbed(every_stage: Inputs) -> dict[str, str]:
    """The same without samples and evaluation."""
    return _undisturbed(every_stage, *SHORT)


def _undisturbed(inputs: Inputs, *overrides: str) -> dict[str, str]:
    run_dir = inputs.root / f"undisturbed-{len(overrides)}" / "run"
    with Driver(inputs, run_dir, ["executor.kind=local", *overrides]) as driver:
        driver.succeed()
    return bytes_of(run_dir)
