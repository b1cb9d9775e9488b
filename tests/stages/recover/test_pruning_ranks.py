"""Rows of S go alike on real ranks of ZeRO 0, 1 and 2 and in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.mapped.registration import register
from stages.recover.config import PruneConfig
from stages.recover.trainer import Trained, Training
from stages.recover.trainer import train as train_alone
from tests.cluster.ranks import run_ranks
from tests.stages.recover.small import config, write_text
from tests.stages.recover.test_pruning import student
from tests.stages.recover.test_zero import TOLERANCE, on_ranks

pytestmark = pytest.mark.slow
PRUNE = {"target": 0.25, "multiple": 1, "threshold": "global", "warmup": 1, "final": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with all rows of S, `output`, and text."""
    register()
    folder = tmp_path_factory.mktemp("pruned")
    student(folder).rename(folder / "student")
    write_text(folder / "tokens.arrow")
    return folder


def describe(made: Path, folder: Path, **changes: Any) -> Training:
    """Writes what the ranks read; the same for this process."""
    folder.mkdir(parents=True)
    wanted = config(steps=6, alpha=0, learning_rate=0.003, mode="experts", **changes)
    job = {
        "student": str(made / "student"),
        "corpus": str(made / "tokens.arrow"),
        "taught": [],
        "config": wanted.model_dump(mode="json"),
        "prune": PRUNE,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return Training(
        student=made / "student",
        needs_code=False,
        corpus=made / "tokens.arrow",
        taught=(),
        config=wanted,
        folder=folder / "job",
        prune=PruneConfig(**PRUNE),
    )


def assert_alike(found: dict[str, Any], expected: Trained) -> None:
    """The same rows, and what one process has in them."""
    assert found["kept"].keys() == expected.kept.keys()
    for name, rows in expected.kept.items():
        assert torch.equal(found["kept"][name], rows), name
    for name, value in expected.values.items():
        assert torch.allclose(found["values"][name], value, **TOLERANCE), name


@pytest.mark.parametrize(
    "section",
    [{"zero_stage": 0}, {"zero_stage": 2, "cpu_offload": True}],
    ids=["plain", "dealt out, offload"],
)
def test_two_ranks_keep_the_rows_that_one_process_keeps(
    made: Path, tmp_path: Path, section: dict[str, Any]
) -> None:
    alone = train_alone(describe(made, tmp_path / "alone"))
    describe(made, tmp_path / "two", ranks=2, deepspeed=section)
    found = on_ranks(tmp_path / "two")
    assert any(rows.shape[1] < alone.values[name].shape[1] for name, rows in alone.kept.items())
    for each in found:
        assert_alike(each, alone)
    for name, rows in alone.kept.items():
        gone = torch.ones(alone.values[name].shape[:2], dtype=torch.bool).scatter(1, rows, False)
        assert not bool(found[0]["values"][name][gone].any())


def test_killed_ranks_go_on_with_their_sensitivities(made: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"ranks": 2, "deepspeed": {"zero_stage": 1}}
    alone = train_alone(describe(made, tmp_path / "alone", **changes))
    killed = describe(made, tmp_path / "killed", **changes)
    run_ranks("die_after", tmp_path / "killed", module="tests.stages.recover.ranks")
    assert list(killed.folder.glob("state-*.safetensors"))
    fewer = describe(made, tmp_path / "fewer", **changes)
    shutil.copytree(killed.folder, fewer.folder)
    ended = train_alone(fewer)
    assert_alike({"kept": ended.kept, "values": ended.values}, alone)
    for each in on_ranks(tmp_path / "killed"):
        assert_alike(each, alone)
