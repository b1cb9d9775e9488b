"""The teacher's predictions: the exact ones, and what is lost when only the likeliest are kept."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stages.corpus.blocks import Block
from stages.corpus.stage import read_blocks
from stages.forward import predicted
from stages.recover.loss import distillation, recovery_loss
from stages.recover.passes import part_of_loss
from stages.recover.taught import Taught
from stages.recover.teach import open_original, say
from tests.stages.recover.small import LENGTH, Small, config, make
from tests.tiny import VOCABULARY, logits_of, open_model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make(tmp_path_factory.mktemp("taught"))


def tokens_of(model: Any, blocks: list[Block]) -> int:
    return predicted(model.config, [block.tokens for block in blocks])


def loss_of(small: Small, top: int | None, **changes: Any) -> float:
    """The loss of the student on all blocks."""
    wanted = config(teacher={"top": top, "dtype": "float32"}, **changes)
    taught = Taught(small.taught(wanted))
    blocks = read_blocks(small.corpus)
    every = taught.blocks(range(len(blocks)))
    model = open_model(small.student)
    with torch.no_grad():
        loss, _ = part_of_loss(model, blocks, every, wanted, tokens_of(model, blocks))
    return float(loss)


def test_the_files_hold_the_exact_distribution_and_its_likeliest_part(small: Small) -> None:
    wanted = config(teacher={"top": None, "dtype": "float32"})
    taught = Taught(small.taught(wanted))
    blocks, original = read_blocks(small.corpus), open_model(small.original)
    assert len(taught) == len(blocks)
    for index in (0, len(blocks) - 1):
        block, kept = blocks[index], taught.block(index)
        logits = logits_of(original, torch.tensor([block.tokens]))[0, :-1]
        exact = (logits / wanted.temperature).log_softmax(-1)
        found = torch.zeros(len(block.tokens) - 1, VOCABULARY).scatter(
            1, kept.ids, kept.log_probabilities
        )
        assert torch.allclose(found, exact, atol=1e-5)
        assert bool(kept.rest.isneginf().all())


def test_the_loss_of_the_likeliest_approaches_the_exact_one_from_below(small: Small) -> None:
    exact = loss_of(small, None)
    errors = [exact - loss_of(small, top) for top in (1, 4, 16, 48, VOCABULARY)]
    assert all(error >= -1e-5 for error in errors)
    assert all(a >= b - 1e-5 for a, b in pairwise(errors))
    assert errors[0] > 100 * abs(errors[-1])
    assert errors[-1] == pytest.approx(0, abs=1e-5)


def test_one_pass_adds_up_to_the_loss_that_is_defined(small: Small) -> None:
    wanted = config(teacher={"top": None, "dtype": "float32"}, alpha=0.7)
    blocks = read_blocks(small.corpus)
    taught, model = Taught(small.taught(wanted)), open_model(small.student)
    tokens = tokens_of(model, blocks)
    assert tokens == (len(blocks) - 1) * (LENGTH - 1) + LENGTH // 2 - 1
    with torch.no_grad():
        parts = [
            part_of_loss(model, [b], taught.block(i), wanted, tokens)[0]
            for i, b in enumerate(blocks)
        ]
        logits = torch.cat([logits_of(model, torch.tensor([b.tokens]))[0, :-1] for b in blocks])
    labels = torch.tensor([t for b in blocks for t in b.tokens[1:]])
    every = taught.blocks(range(len(blocks)))
    expected, _ = recovery_loss(logits, labels, every, alpha=0.7, temperature=wanted.temperature)
    assert float(sum(parts)) == pytest.approx(float(expected), abs=1e-4)


def test_the_papers_scaling_adds_up_positions(small: Small) -> None:
    wanted = config(teacher={"top": None, "dtype": "float32"}, preset="paper", warmup=1, batch=11)
    blocks = read_blocks(small.corpus)[:11]  # whole ones: the paper's code counts padding too
    every = Taught(small.taught(wanted)).blocks(range(11))
    model = open_model(small.student)
    with torch.no_grad():
        loss, _ = part_of_loss(model, blocks, every, wanted, tokens_of(model, blocks))
    ids = torch.tensor([block.tokens for block in blocks])
    ours, theirs = (logits_of(open_model(f), ids)[:, :-1] for f in (small.student, small.original))
    likelihood = F.cross_entropy(ours.flatten(0, 1), ids[:, 1:].flatten())
    summed = F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="batchmean")
    assert float(loss) == pytest.approx(float(likelihood + 0.2 * summed), rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_layer_by_layer_the_original_says_the_same(tmp_path: Path, family: str) -> None:
    small = make(tmp_path / "small", family)
    wanted = config()
    blocks = read_blocks(small.corpus)
    for engine in ("resident", "streaming"):
        model = open_original(small.original, "float32", engine)
        say(model, blocks, tmp_path / engine, wanted, engine)
    assert (tmp_path / "resident").read_bytes() == (tmp_path / "streaming").read_bytes()
    assert not list(tmp_path.glob(".*.tmp"))


def test_padding_changes_nothing(small: Small, tmp_path: Path) -> None:
    """A short block alone, and beside a longer one."""
    blocks = read_blocks(small.corpus)
    model = open_original(small.original, "float32", "resident")
    wanted = config()
    say(model, blocks[-2:], tmp_path / "beside", wanted, "resident")
    say(model, blocks[-1:], tmp_path / "alone", wanted, "resident")
    together, alone = Taught([tmp_path / "beside"]).block(1), Taught([tmp_path / "alone"]).block(0)
    student = torch.randn(len(alone.rest), VOCABULARY)
    losses = [distillation(student, each, 2.0) for each in (together, alone)]
    assert torch.allclose(*losses, atol=1e-4)
