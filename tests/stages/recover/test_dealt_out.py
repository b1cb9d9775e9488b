"""ZeRO 3: no rank holds the whole student, whatever form it has, and the same is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.mapped.registration import register
from stages.compress.config import CompressConfig
from stages.recover.api import recover
from stages.recover.trainer import Training
from stages.recover.trainer import train as train_alone
from tests.cluster.ranks import run_ranks
from tests.stages.recover.small import Small, config, make, write_text
from tests.stages.recover.test_formats import student
from tests.stages.recover.test_zero import TOLERANCE, compare, describe, on_ranks

pytestmark = pytest.mark.slow
STAGE_3: dict[str, Any] = {"zero_stage": 3}


def reduced(folder: Path) -> Small:
    """U V + S of a family whose head is its embedding."""
    folder.mkdir()
    compress = CompressConfig(rank=4, sparse=0.25, multiple=1)
    made = student(folder, "olmoe", format="mapped", compress=compress)
    made.rename(folder / "student")
    small = Small(folder)
    write_text(small.corpus)
    register()
    return small


def started(folder: Path, function: str) -> None:
    ended = run_ranks(function, folder, module="tests.stages.recover.ranks")
    assert all(each.returncode == 0 for each in ended), "\n".join(e.stdout for e in ended)


def test_a_rank_holds_its_share_of_every_value_and_nothing_else(tmp_path: Path) -> None:
    small = reduced(tmp_path / "small")
    describe(small, tmp_path / "two", ranks=2, deepspeed=STAGE_3, alpha=0)
    started(tmp_path / "two", "open_dealt_out")
    for rank in range(2):
        sizes = json.loads((tmp_path / "two" / f"rank-{rank}.json").read_text())
        assert any(name.endswith("gate_proj.s") for name in sizes), sorted(sizes)
        for name, (whole, share, size) in sizes.items():
            assert (whole, share) == (0, -(-size // 2)), name


def test_ranks_write_the_files_that_one_process_writes(tmp_path: Path) -> None:
    small = reduced(tmp_path / "small")
    changes: dict[str, Any] = {"ranks": 2, "deepspeed": STAGE_3, "mode": "full", "alpha": 0}
    recover(small.student, tmp_path / "alone", config(**changes), small.corpus)
    describe(small, tmp_path / "two", **changes)
    started(tmp_path / "two", "write")
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    found = load_file(tmp_path / "two" / "trained.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in alone.items()} == {
        n: (t.dtype, t.shape) for n, t in found.items()
    }
    for name, value in alone.items():
        assert torch.allclose(found[name], value, **TOLERANCE), name


def test_three_ranks_go_on_where_one_process_was_though_they_divide_no_value_evenly(
    tmp_path: Path,
) -> None:
    small = make(tmp_path / "small")
    changes: dict[str, Any] = {"ranks": 3, "deepspeed": STAGE_3, "mode": "full", "batch": 6}
    alone = describe(small, tmp_path / "alone", **changes)
    expected = train_alone(alone).values
    (alone.folder / "state-00000006.safetensors").unlink()
    three: Training = describe(small, tmp_path / "three", **changes)
    shutil.copytree(alone.folder, three.folder)
    compare(on_ranks(tmp_path / "three", size=3), expected)
