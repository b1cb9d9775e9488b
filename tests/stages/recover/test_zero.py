"""Training dealt out to real ranks by DeepSpeed: the same result as one process."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.recover.trainer import Training
from stages.recover.trainer import train as train_alone
from tests.cluster.ranks import run_ranks
from tests.stages.recover.small import Small, config, make

pytestmark = pytest.mark.slow
# fp32 sums over two halves of a batch, and Adam's first steps, which divide by tiny moments.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make(tmp_path_factory.mktemp("zero"))


def describe(small: Small, folder: Path, **changes: Any) -> Training:
    """Writes what the ranks read; the same for this process."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = config(**changes)
    job = {
        "student": str(small.student),
        "corpus": str(small.corpus),
        "taught": [str(path) for path in small.taught(wanted)],
        "config": wanted.model_dump(mode="json"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    return Training(
        small.student, False, small.corpus, small.taught(wanted), wanted, folder / "job"
    )


def on_ranks(folder: Path, function: str = "train", size: int = 2) -> list[dict[str, Any]]:
    ended = run_ranks(function, folder, size, module="tests.stages.recover.ranks")
    assert all(each.returncode == 0 for each in ended), "\n".join(e.stdout for e in ended)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(size)]


WAYS = {
    "plain": {"zero_stage": 0},
    "offload": {"zero_stage": 2, "cpu_offload": True},
    "all dealt out": {"zero_stage": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_what_one_process_trains(small: Small, tmp_path: Path, way: str) -> None:
    changes: dict[str, Any] = {"ranks": 2, "deepspeed": WAYS[way], "mode": "full"}
    alone = train_alone(describe(small, tmp_path / "alone", **changes))
    describe(small, tmp_path / "two", **changes)
    compare(on_ranks(tmp_path / "two"), alone.values)


def compare(found: list[dict[str, Any]], expected: dict[str, torch.Tensor]) -> None:
    """All ranks have the same bits, and what one process has to within the tolerance."""
    for each in found:
        assert each["values"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(each["values"][name], found[0]["values"][name])
            assert torch.allclose(each["values"][name], value, **TOLERANCE), name


def test_killed_ranks_go_on_in_any_number_and_repeat_their_bytes(
    small: Small, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"ranks": 2, "deepspeed": {"zero_stage": 1}, "mode": "full"}
    alone = train_alone(describe(small, tmp_path / "alone", **changes))
    killed = describe(small, tmp_path / "killed", **changes)
    ended = run_ranks("die_after", tmp_path / "killed", module="tests.stages.recover.ranks")
    assert [each.returncode for each in ended] == [-signal.SIGKILL] * 2
    states = sorted(path.name for path in killed.folder.glob("state-*.safetensors"))
    assert states == ["state-00000002.safetensors", "state-00000004.safetensors"]
    for name in ("again", "fewer"):
        shutil.copytree(killed.folder, describe(small, tmp_path / name, **changes).folder)
    fewer = train_alone(describe(small, tmp_path / "fewer", **changes))
    compare([{"values": fewer.values}], alone.values)
    resumed, again = on_ranks(tmp_path / "killed"), on_ranks(tmp_path / "again")
    compare(resumed, alone.values)
    for name, value in resumed[0]["values"].items():
        assert torch.equal(value, again[0]["values"][name])


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_runs_round_what_is_computed_and_not_what_is_kept(
    small: Small, tmp_path: Path, stage: int
) -> None:
    changes: dict[str, Any] = {"mode": "experts", "learning_rate": 1e-5}
    alone = train_alone(describe(small, tmp_path / "alone", **changes))
    changes |= {"ranks": 1, "deepspeed": {"zero_stage": stage, "bf16": True}}
    describe(small, tmp_path / "one", **changes)
    (found,) = on_ranks(tmp_path / "one", size=1)
    for name, value in alone.values.items():
        # Steps of 1e-5 are lost in bfloat16 values; in the fp32 ones behind them they are not.
        assert torch.allclose(found["values"][name], value, atol=1e-4), name
        assert not torch.equal(found["values"][name], found["values"][name].bfloat16().float())
