"""Recovery in one process: what is trained, what stays, what is written, what is refused."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import Checkpoint
from models.tensors import read_metadata
from stages.errors import Paused, TrainingError
from stages.recover.api import recover
from stages.recover.order import blocks_of_step, share_of
from stages.recover.progress import read_course
from stages.recover.rate import rate_at
from stages.recover.state import newest
from tests.stages.recover.small import Small, config, make
from tests.tiny import logits_of, open_model, random_ids, same_bits


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make(tmp_path_factory.mktemp("recover"))


def run(small: Small, target: Path, **changes: Any) -> dict[str, Any]:
    wanted = config(**changes)
    taught = small.taught(wanted) if wanted.alpha else ()
    scratch = target.with_name(target.name + "-states")
    return recover(small.student, target, wanted, small.corpus, taught, scratch=scratch)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    assert all(old[name].dtype == new[name].dtype for name in old)
    return {name for name in old if not same_bits(old[name], new[name])}


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"mode": "router"}, ("gate.weight",)),
        ({"mode": "experts"}, (".experts.",)),
        ({"mode": "experts", "router": True}, (".experts.", "gate.weight")),
        ({"mode": "full"}, ("",)),
    ],
)
def test_a_mode_changes_its_values_and_no_bit_of_the_others(
    small: Small, tmp_path: Path, changes: dict[str, Any], trained: tuple[str, ...]
) -> None:
    run(small, tmp_path / "out", **changes)
    moved = changed(small.student, tmp_path / "out")
    wanted = {n for n in tensors(small.student) if any(part in n for part in trained)}
    assert moved == wanted
    assert Checkpoint.open(tmp_path / "out").config == Checkpoint.open(small.student).config


def test_the_loss_falls_and_the_student_says_more_of_what_the_original_says(
    small: Small, tmp_path: Path
) -> None:
    # The text is noise, so that cross-entropy leads away from the original.
    run(small, tmp_path / "out", steps=30, mode="full", alpha=100, learning_rate=0.003)
    course = read_course(tmp_path / "out-states" / "course.jsonl")
    assert [line["step"] for line in course] == list(range(1, 31))
    assert course[-1]["distillation"] < 0.5 * course[0]["distillation"]
    ids = random_ids(4, 8)
    said = [logits_of(open_model(f), ids) for f in (small.original, small.student)]
    after = logits_of(open_model(tmp_path / "out"), ids)
    assert float((after - said[0]).square().mean()) < float((said[1] - said[0]).square().mean())


def test_the_same_inputs_give_the_same_bytes_and_passes_do_not_matter_much(
    small: Small, tmp_path: Path
) -> None:
    for name, size in (("a", 2), ("b", 2), ("c", 4)):
        run(small, tmp_path / name, micro_batch=size)
    assert not changed(tmp_path / "a", tmp_path / "b")
    once, other = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    for name in once:
        assert torch.allclose(once[name], other[name], atol=2e-5), name


def test_a_resumed_training_ends_in_the_same_bytes(small: Small, tmp_path: Path) -> None:
    run(small, tmp_path / "whole")
    states = tmp_path / "whole-states"
    (states / "state-00000006.safetensors").unlink()
    assert (states / "state-00000004.safetensors").exists()
    shutil.copytree(states, tmp_path / "part-states")
    run(small, tmp_path / "part")
    assert not changed(tmp_path / "whole", tmp_path / "part")
    course = read_course(tmp_path / "part-states" / "course.jsonl")
    assert [line["step"] for line in course] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_state_is_passed_over(small: Small, tmp_path: Path) -> None:
    run(small, tmp_path / "out")
    path = tmp_path / "out-states" / "state-00000006.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    other = path.with_name("state-00000004.safetensors")
    found = newest(path.parent, read_metadata(other)["fingerprint"])
    assert found is not None and found.step == 4
    assert newest(path.parent, "another training") is None


def test_a_pause_leaves_a_state_from_which_it_goes_on(small: Small, tmp_path: Path) -> None:
    states = tmp_path / "out-states"
    states.mkdir()
    (states / "stop").touch()
    with pytest.raises(Paused, match="pause after step 1"):
        run(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (states / "stop").unlink()
    run(small, tmp_path / "out")
    run(small, tmp_path / "other")
    assert not changed(tmp_path / "out", tmp_path / "other")


def test_nan_stops_and_names_where_it_began(small: Small, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss of step \d+ is not finite.*first") as told:
        run(small, tmp_path / "out", learning_rate=1e30, clip=None, warmup=0, checkpoint_every=1)
    assert "layers." in str(told.value) or "embed" in str(told.value)
    states = sorted((tmp_path / "out-states").glob("state-*.safetensors"))
    assert states
    assert not (tmp_path / "out").exists()


def test_experts_without_a_gradient_are_named(tmp_path: Path) -> None:
    small = make(tmp_path / "small")
    weights = small.student / "model.safetensors"
    found = load_file(weights)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    dead = {
        n: torch.zeros_like(t) for n, t in found.items() if "layers.1." in n and "experts.2." in n
    }
    assert name in dead
    save_file(found | dead, weights, metadata={"format": "pt"})
    assert run(small, tmp_path / "out")["untrained"] == {1: [2]}


def test_distillation_without_a_teacher_is_refused(small: Small, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no teacher"):
        recover(small.student, tmp_path / "out", config(), small.corpus)
    run(small, tmp_path / "out", alpha=0)


@pytest.mark.parametrize("top", [None, 4, 16])
def test_the_papers_scaling_is_another_loss(small: Small, tmp_path: Path, top: int | None) -> None:
    taught = {"top": top, "dtype": "float32"}
    run(small, tmp_path / "ours", teacher=taught, steps=2)
    run(small, tmp_path / "paper", teacher=taught, steps=2, preset="paper", warmup=1)
    first = [
        read_course(tmp_path / f"{name}-states" / "course.jsonl")[0] for name in ("ours", "paper")
    ]
    assert first[0]["cross_entropy"] == pytest.approx(first[1]["cross_entropy"], abs=1e-4)


def test_every_block_is_seen_once_an_epoch_whatever_the_ranks() -> None:
    seen = [i for step in range(3) for i in blocks_of_step(step, 12, 4, seed=1)]
    assert sorted(seen) == list(range(12))
    again = [i for step in range(3, 6) for i in blocks_of_step(step, 12, 4, seed=1)]
    assert sorted(again) == list(range(12)) and again != seen
    step = blocks_of_step(1, 12, 4, seed=1)
    for ranks in (1, 2, 4):
        parts = [share_of(step, rank, ranks, 3) for rank in range(ranks)]
        assert [i for part in parts for each in part for i in each] == step
        assert len({len(part) for part in parts}) == 1
    assert len(blocks_of_step(0, 3, 8, seed=0)) == 8


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_then_falls_and_is_never_nothing(schedule: str) -> None:
    wanted = config(steps=50, warmup=5, schedule=schedule, learning_rate=0.5)
    rates = [rate_at(step, wanted) for step in range(50)]
    assert all(a < b for a, b in pairwise(rates[:6]))
    assert max(rates) == rates[5] == 0.5
    assert all(a >= b > 0 for a, b in pairwise(rates[5:]))
