"""Rows of S go by sensitivity: how many, which, and what the files then hold."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.mapped.registration import register
from models.moe import MoeCheckpoint
from stages.compress.config import CompressConfig
from stages.compress.factor import shape_of
from stages.compress.schedule import kept_share
from stages.export.config import ExportConfig
from stages.group.decision import from_labels
from stages.recover.api import recover
from stages.recover.config import PruneConfig
from stages.recover.pruning import Pruning, strongest_rows
from tests.stages.recover.small import config, write_text
from tests.tiny import PROPERTY, compress, logits_of, open_model, random_ids, save_tiny

SIZES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 5)), min_size=1)
STEPS = 20


def pruning_of(sizes: list[tuple[int, int, int]], seed: int, wanted: PruneConfig) -> Pruning:
    """Random values, and random sensitivities."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        f"{i}.s": nn.Parameter(torch.rand(s, generator=generator)) for i, s in enumerate(sizes)
    }
    found = Pruning(parts, wanted, STEPS)
    found.load({n: torch.rand(p.shape[:2], generator=generator) for n, p in parts.items()})
    return found


@PROPERTY
@given(SIZES, st.integers(0, 9), st.integers(0, 100), st.sampled_from([1, 8]))
def test_the_schedule_ends_at_the_numbers_of_a_decomposition_without_training(
    sizes: list[tuple[int, int, int]], seed: int, percent: int, multiple: int
) -> None:
    """Of every matrix, with `threshold: layer`; in bytes, to the last possible step, with `global`;
    and before that they fall from all rows."""
    shared: dict[str, Any] = {
        "target": percent / 100,
        "multiple": multiple,
        "warmup": 3,
        "final": 4,
    }
    shape = CompressConfig(rank=1, sparse=percent / 100, multiple=multiple)
    even = {f"{i}.s": shape_of(shape, rows, 99).kept for i, (_, rows, _) in enumerate(sizes)}

    layer = pruning_of(sizes, seed, PruneConfig(threshold="layer", **shared))
    course = [layer.numbers(step) for step in range(STEPS + 1)]
    assert course[0] == course[3] == {f"{i}.s": rows for i, (_, rows, _) in enumerate(sizes)}
    assert course[STEPS] == course[STEPS - 4] == even
    assert all(a[n] >= b[n] for a, b in pairwise(course) for n in even)

    every = pruning_of(sizes, seed, PruneConfig(threshold="global", **shared))
    prices = {f"{i}.s": k * (4 * width + 8) for i, (k, _, width) in enumerate(sizes)}

    def spent(numbers: dict[str, int]) -> int:
        return sum(rows * prices[name] for name, rows in numbers.items())

    assert every.numbers(3) == course[0]
    left = spent(even) - spent(every.numbers(STEPS))
    assert 0 <= left < multiple * max(prices.values())


def test_every_expert_keeps_its_own_best_and_ties_go_to_longer_rows() -> None:
    scores = {"a.s": torch.tensor([[1.0, 3, 2, 0], [0.0, 0, 0, 0]])}
    norms = {"a.s": torch.tensor([[1.0, 1, 1, 1], [1.0, 5, 5, 9]])}
    found = strongest_rows(scores, norms, {"a.s": 2})
    assert found["a.s"].tolist() == [[1, 2], [1, 3]]
    assert strongest_rows(scores, norms, {"a.s": 0})["a.s"].shape == (2, 0)


def test_with_one_threshold_layers_differ() -> None:
    parts = {name: nn.Parameter(torch.ones(1, 4, 3)) for name in ("a.s", "b.s")}
    pruning = Pruning(parts, PruneConfig(target=0.5), STEPS)
    pruning.load({"a.s": torch.tensor([[9.0, 8, 7, 1]]), "b.s": torch.tensor([[6.0, 2, 2, 2]])})
    kept = pruning.apply(STEPS)
    assert {name: rows.tolist() for name, rows in kept.items()} == {
        "a.s": [[0, 1, 2]],
        "b.s": [[0]],
    }
    assert parts["b.s"].data[0, 1:].count_nonzero() == 0
    assert bool((parts["a.s"].data[0, :3] == 1).all())


def test_rows_that_matter_for_the_loss_survive_whatever_their_length() -> None:
    """y = S x on inputs that see half of the columns: a row that is off there, planted short, and
    long rows that nothing reads."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.tensor([2, 5, 11])
    part = nn.Parameter(torch.randn(1, 16, 8, generator=generator) * 3)
    part.data[0, :, :4] = 0  # what the inputs see
    part.data[0, planted] = 0.01 * torch.randn(3, 8, generator=generator)
    start, goal = part.detach()[0].clone(), torch.zeros(16, 8)
    goal[planted, :4] = 1.0
    pruning = Pruning({"x.s": part}, PruneConfig(target=3 / 16, threshold="layer"), STEPS)
    optimiser = torch.optim.Adam([part], lr=0.05)
    for step in range(STEPS):
        x = torch.zeros(32, 8)
        x[:, :4] = torch.randn(32, 4, generator=generator)
        optimiser.zero_grad()
        (x @ (part[0] - goal).T).square().mean().backward()
        pruning.observe()
        optimiser.step()
        kept = pruning.apply(step + 1)
    assert kept["x.s"].tolist() == [planted.tolist()]
    by_norm = start.square().sum(dim=1).argsort(descending=True)[:3]
    assert not set(by_norm.tolist()) & set(planted.tolist())


def test_an_expert_without_a_gradient_ranks_lowest_and_order_does_not_matter() -> None:
    part = nn.Parameter(torch.ones(2, 3, 4))
    pruning = Pruning({"x.s": part}, PruneConfig(target=0.5), steps=4)
    pruning.observe()  # no gradient at all
    assert not pruning.scores["x.s"].any()
    part.grad = torch.zeros(2, 3, 4)
    part.grad[0] = 1.0
    pruning.observe()
    assert pruning.scores["x.s"].tolist() == [[pytest.approx(0.15)] * 3, [0.0] * 3]
    pruning.apply(4)
    assert int((part.data.abs().sum(dim=2) > 0).sum()) in (2, 4)


def student(folder: Path) -> Path:
    """All rows of S beside U V."""
    save_tiny(folder / "original", "mixtral")
    moe = MoeCheckpoint.open(folder / "original")
    pairs: list[int | None] = [0, 0, 2, 2, 4, 4]
    decisions = [from_labels(layer, pairs, [1.0] * 6) for layer in moe.layers]
    full = CompressConfig(rank=4, sparse=1.0, multiple=1)
    return compress(moe, decisions, folder, ExportConfig(format="mapped", compress=full))


def test_a_pruned_student_is_small_opens_and_resumes(tmp_path: Path) -> None:
    register()
    full, text = student(tmp_path), tmp_path / "tokens.arrow"
    write_text(text)
    prune = PruneConfig(target=0.2, warmup=1, final=2)
    wanted = config(steps=8, alpha=0, checkpoint_every=3, learning_rate=0.003)
    whole, states = tmp_path / "whole", tmp_path / "states"
    recover(full, whole, wanted, text, scratch=states, prune=prune)
    old, new = Checkpoint.open(full), Checkpoint.open(whole)
    kept, every = (
        sum(i.nbytes for n, i in each.tensors.items() if n.endswith(".s")) for each in (new, old)
    )
    assert 0.1 < kept / every < 0.3
    assert float(logits_of(open_model(whole), random_ids(2, 5)).abs().sum()) > 0
    counts = {
        tuple(each) for layer in new.config["expert_factors"].values() for each in layer.values()
    }
    assert len(counts) > 1 or kept_share(8, 8, 1, 2, 0.2) == 0.2
    # Rows that stay are the trained ones: the function is that of the model that was trained.
    (states / "state-00000008.safetensors").unlink()
    recover(full, tmp_path / "again", wanted, text, scratch=states, prune=prune)
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_none_and_all_of_s(tmp_path: Path, target: float) -> None:
    register()
    full, text = student(tmp_path), tmp_path / "tokens.arrow"
    write_text(text)
    prune = PruneConfig(target=target)
    recover(full, tmp_path / "out", config(steps=2, alpha=0), text, prune=prune)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith(".s") for name in names) == bool(target)
    assert bool(logits_of(open_model(tmp_path / "out"), random_ids(1, 4)).isfinite().all())


def test_a_student_without_s_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "tokens.arrow")
    save_tiny(tmp_path / "plain", "mixtral")
    extra: dict[str, Any] = {"prune": PruneConfig()}
    with pytest.raises(CheckpointError, match="no S that is trained"):
        recover(
            tmp_path / "plain",
            tmp_path / "out",
            config(alpha=0),
            tmp_path / "tokens.arrow",
            **extra,
        )
