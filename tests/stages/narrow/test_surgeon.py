"""Neuron removal against leaving neurons out one by one and solving again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.narrow.surgeon import damp, narrow
from tests.tiny import PROPERTY

SEEDS = st.integers(0, 2**16)
WIDTH, HIDDEN, TOKENS = 6, 4, 40


def expert(seed: int) -> tuple[Tensor, Tensor]:
    """Activations [N, I] and rows of the down projection [I, H]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64),
        torch.randn(WIDTH, HIDDEN, generator=generator, dtype=torch.float64),
    )


def error_without(hidden: Tensor, rows: Tensor, kept: list[int]) -> float:
    """The oracle: least squares on the neurons that stay."""
    target = hidden @ rows
    solved = torch.linalg.lstsq(hidden[:, kept], target).solution
    return float((target - hidden[:, kept] @ solved).square().sum())


@PROPERTY
@given(seed=SEEDS)
def test_one_neuron_fewer_is_the_best_choice(seed: int) -> None:
    hidden, rows = expert(seed)
    errors = [
        error_without(hidden, rows, [n for n in range(WIDTH) if n != gone]) for gone in range(WIDTH)
    ]

    found = narrow(hidden.T @ hidden, rows, WIDTH - 1, ridge=0.0)

    gone = (set(range(WIDTH)) - set(found.kept.tolist())).pop()
    assert errors[gone] == pytest.approx(min(errors), rel=1e-6)
    assert found.error == pytest.approx(min(errors), rel=1e-6, abs=1e-9)


@PROPERTY
@given(seed=SEEDS, keep=st.integers(1, WIDTH), blocks=st.integers(1, 8))
def test_the_error_is_that_of_the_solved_rows(seed: int, keep: int, blocks: int) -> None:
    hidden, rows = expert(seed)

    found = narrow(hidden.T @ hidden, rows, keep, ridge=0.0, blocks=blocks)

    kept = found.kept.tolist()
    assert len(kept) == keep and kept == sorted(set(kept))
    left = float((hidden @ rows - hidden[:, kept] @ found.rows).square().sum())
    assert found.error == pytest.approx(left, rel=1e-6, abs=1e-8)
    assert found.error == pytest.approx(error_without(hidden, rows, kept), rel=1e-6, abs=1e-8)


@PROPERTY
@given(seed=SEEDS, keep=st.integers(3, WIDTH))
def test_neurons_that_others_can_replace_cost_nothing(seed: int, keep: int) -> None:
    """Planted: only three neurons are independent, the others are their combinations."""
    hidden, rows = expert(seed)
    mix = torch.randn(3, WIDTH - 3, generator=torch.Generator().manual_seed(seed)).double()
    hidden = torch.cat([hidden[:, :3], hidden[:, :3] @ mix], dim=1)

    found = narrow(hidden.T @ hidden, rows, keep, ridge=1e-10)

    assert found.error <= 1e-6 * found.energy
    kept = hidden[:, found.kept.tolist()] @ found.rows
    torch.testing.assert_close(kept, hidden @ rows, rtol=1e-3, atol=1e-4)


@PROPERTY
@given(seed=SEEDS, keep=st.integers(1, WIDTH))
def test_the_order_of_the_neurons_does_not_matter(seed: int, keep: int) -> None:
    hidden, rows = expert(seed)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))

    found = narrow(hidden.T @ hidden, rows, keep, ridge=0.01)
    moved = narrow(hidden[:, order].T @ hidden[:, order], rows[order], keep, ridge=0.01)

    assert set(order[moved.kept].tolist()) == set(found.kept.tolist())
    assert moved.error == pytest.approx(found.error, rel=1e-6, abs=1e-9)


def test_without_data_the_largest_rows_stay() -> None:
    _, rows = expert(0)

    found = narrow(torch.zeros(WIDTH, WIDTH, dtype=torch.float64), rows, 2, ridge=0.1)

    assert found.kept.tolist() == rows.norm(dim=1).topk(2).indices.sort().values.tolist()
    torch.testing.assert_close(found.rows, rows[found.kept])


def test_all_neurons_stay_as_they_are() -> None:
    hidden, rows = expert(1)

    found = narrow(hidden.T @ hidden, rows, WIDTH, ridge=0.01)

    assert found.rows.equal(rows)
    assert found.error == 0.0


@PROPERTY
@given(seed=SEEDS, keep=st.integers(1, WIDTH - 1))
def test_removal_is_greedy_one_by_one(seed: int, keep: int) -> None:
    """The oracle: the cheapest neuron goes, everything is solved again, and so on."""
    hidden, rows = expert(seed)
    kept = list(range(WIDTH))
    while len(kept) > keep:
        rest = [[n for n in kept if n != gone] for gone in kept]
        kept = min(rest, key=lambda each: error_without(hidden, rows, each))

    found = narrow(hidden.T @ hidden, rows, keep, ridge=0.0)

    assert found.kept.tolist() == kept


def test_of_two_equal_neurons_one_stays() -> None:
    """Both look free as long as the other is there."""
    hidden, rows = expert(3)
    twice, both = torch.cat([hidden, hidden], dim=1), torch.cat([rows, rows])

    for blocks in (1, 3, 64):
        found = narrow(twice.T @ twice, both, WIDTH, ridge=1e-9, blocks=blocks)

        assert sorted(n % WIDTH for n in found.kept.tolist()) == list(range(WIDTH))


@pytest.mark.parametrize("tokens", [1, WIDTH - 2])
def test_a_singular_gram_is_solved_without_any_ridge(tokens: int) -> None:
    """Fewer tokens than neurons, one of which is dead: what was put out there still is."""
    hidden, rows = expert(1)
    few = hidden[:tokens].clone()
    few[:, 0] = 0

    found = narrow(few.T @ few, rows, WIDTH - 1, ridge=0.0)

    assert found.error <= 1e-6 * found.energy
    assert torch.allclose(few[:, found.kept] @ found.rows, few @ rows, atol=1e-5)


def test_damping_is_in_units_of_the_mean_diagonal() -> None:
    gram = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))

    assert damp(gram, 0.5).diagonal().tolist() == [2.0, 4.0]


@pytest.mark.parametrize("keep", [0, WIDTH + 1])
def test_impossible_widths_are_refused(keep: int) -> None:
    hidden, rows = expert(0)

    with pytest.raises(ValueError, match=f"cannot keep {keep} of {WIDTH}"):
        narrow(hidden.T @ hidden, rows, keep, ridge=0.0)
