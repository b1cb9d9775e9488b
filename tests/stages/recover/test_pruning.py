"""Rows of S go by sensitivity: how many, which, and what the files then hold."""

from __future__ import annotations

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
from stages.compress.schedule import kept_share
from stages.export.config import ExportConfig
from stages.group.decision import from_labels
from stages.recover.api import recover
from stages.recover.config import PruneConfig
from stages.recover.pruning import Pruning, kept_rows
from tests.stages.recover.small import config, write_text
from tests.tiny import PROPERTY, compress, logits_of, open_model, random_ids, save_tiny

SIZES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5)), min_size=1)


def scores_of(sizes: list[tuple[int, int, int]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{i}.s": torch.rand(k, n, generator=generator) for i, (k, n, _) in enumerate(sizes)}


@PROPERTY
@given(SIZES, st.integers(0, 9), st.floats(0, 1))
def test_the_share_is_kept_to_within_half_a_row_of_every_expert(
    sizes: list[tuple[int, int, int]], seed: int, share: float
) -> None:
    scores = scores_of(sizes, seed)
    widths = {f"{i}.s": width for i, (_, _, width) in enumerate(sizes)}
    kept = kept_rows(scores, widths, share)
    total = sum(scores[n].numel() * widths[n] for n in scores)
    found = sum(kept[n].numel() * widths[n] for n in scores)
    slack = sum(len(scores[n]) * widths[n] for n in scores) / 2 + max(widths.values())
    assert abs(found - share * total) <= slack
    for name, rows in kept.items():
        assert bool((rows.diff(dim=1) > 0).all())
        for expert, mine in enumerate(rows):
            others = torch.ones(scores[name].shape[1], dtype=torch.bool).scatter(0, mine, False)
            if len(mine) and bool(others.any()):
                assert scores[name][expert][mine].min() >= scores[name][expert][others].max()


def test_the_whole_and_nothing_stay_exactly_and_layers_differ() -> None:
    scores = {"a.s": torch.tensor([[9.0, 8, 7, 1]]), "b.s": torch.tensor([[6.0, 2, 2, 2]])}
    widths = {"a.s": 3, "b.s": 3}
    assert {n: k.tolist() for n, k in kept_rows(scores, widths, 0.5).items()} == {
        "a.s": [[0, 1, 2]],
        "b.s": [[0]],
    }
    assert all(kept.shape == (1, 4) for kept in kept_rows(scores, widths, 1.0).values())
    assert all(kept.shape == (1, 0) for kept in kept_rows(scores, widths, 0.0).values())
    # Ties go to the earlier row.
    assert kept_rows({"a.s": torch.zeros(2, 4)}, {"a.s": 1}, 0.5)["a.s"].tolist() == [[0, 1]] * 2


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
