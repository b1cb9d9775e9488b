"""Fixtures of the command-line tests; the tiny checkpoint is made once per session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.orchestrator.tiny_run import Command, Inputs, caller, private_cache, write_inputs


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    root = tmp_path_factory.mktemp("pristine")
    yield from private_cache(tmp_path_factory.mktemp("datasets"), write_inputs(root))


@pytest.fixture(scope="session")
def finished(pristine: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A run that ended well; to be read only."""
    from orchestrator.load import load
    from orchestrator.preflight import prepare
    from orchestrator.run import run

    root = tmp_path_factory.mktemp("finished") / "inputs"
    shutil.copytree(pristine.root, root)
    inputs = Inputs(root)
    run(prepare(load(str(inputs.recipe())).config))
    return inputs


@pytest.fixture
def inputs(pristine: Inputs, tmp_path: Path) -> Inputs:
    root = tmp_path / "inputs"
    shutil.copytree(pristine.root, root)
    return Inputs(root)


@pytest.fixture
def coalesce(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return caller(monkeypatch, capfd)
