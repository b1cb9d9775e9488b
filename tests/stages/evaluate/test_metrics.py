"""Losses and divergences against loops, and nothing from padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.evaluate.metrics import (
    kl_divergence,
    next_token_losses,
    overall,
    sampled_positions,
)
from tests.tiny import PROPERTY


def batch(lengths: list[int], left: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, 7] logits, [B, S] ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    logits = torch.randn(len(lengths), width, 7, generator=generator)
    ids = torch.randint(7, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = True
    return (logits, ids, mask) if left else (logits, ids, mask.flip(1))


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
def test_losses_equal_a_loop_over_real_tokens(lengths: list[int], left: bool, seed: int) -> None:
    logits, ids, mask = batch(lengths, left, seed)
    expected = [
        math.log(sum(math.exp(x) for x in logits[row, i].tolist()))
        - float(logits[row, i, ids[row, i + 1]])
        for row in range(len(lengths))
        for i in range(mask.shape[1] - 1)
        if mask[row, i] and mask[row, i + 1]
    ]

    found = next_token_losses(logits, ids, mask)

    assert len(found) == sum(lengths) - len(lengths)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_content_of_padding_does_not_matter() -> None:
    logits, ids, mask = batch([5, 2], False, 0)
    other = torch.where(mask, ids, 0), torch.where(mask[..., None], logits, 1e9)

    found = next_token_losses(other[1], other[0], mask)

    assert found.equal(next_token_losses(logits, ids, mask))


def test_losses_are_computed_in_fp32() -> None:
    logits, ids, mask = batch([6], False, 0)

    assert next_token_losses(logits.bfloat16(), ids, mask).dtype == torch.float32


def log_probabilities(seed: int) -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).log_softmax(dim=-1)


@pytest.mark.parametrize("seed", range(3))
def test_divergence_is_that_of_the_original_from_the_other(seed: int) -> None:
    p, q = log_probabilities(seed), log_probabilities(seed + 10)
    expected = (p.exp() * (p - q)).sum(dim=-1)

    found = kl_divergence(p, q)

    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, kl_divergence(q, p))
    assert (found > 0).all()


def test_a_model_does_not_diverge_from_itself() -> None:
    assert kl_divergence(log_probabilities(0), log_probabilities(0)).abs().max() == 0


@PROPERTY
@given(count=st.integers(0, 500), wanted=st.integers(0, 600))
def test_sampled_positions_are_distinct_ordered_and_in_range(count: int, wanted: int) -> None:
    positions = sampled_positions(count, wanted).tolist()

    assert len(positions) == min(count, wanted)
    assert positions == sorted(set(positions))
    assert all(0 <= position < count for position in positions)


def test_sampled_positions_are_evenly_spaced() -> None:
    assert sampled_positions(10, 4).tolist() == [0, 2, 5, 7]


def test_every_domain_counts_the_same() -> None:
    assert overall({"large": 4.0, "small": 9.0}) == pytest.approx(6.0)
