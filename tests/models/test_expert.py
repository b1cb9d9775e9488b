"""Reordering neurons changes nothing that an expert computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.expert import Expert
from tests.tiny import PROPERTY, apply, random_expert, random_input, random_permutation, same

SHAPES = {"neurons": st.integers(1, 24), "hidden": st.integers(1, 16), "seed": st.integers(0, 99)}
KINDS = {"gated": st.booleans(), "biases": st.booleans()}


@PROPERTY
@given(**SHAPES, **KINDS)
def test_any_permutation_leaves_the_function_unchanged_in_fp64(
    neurons: int, hidden: int, seed: int, gated: bool, biases: bool
) -> None:
    expert = random_expert(neurons, hidden, seed, gated=gated, biases=biases, dtype=torch.float64)
    x = random_input(5, hidden, seed + 1, torch.float64)

    moved = expert.permuted(random_permutation(neurons, seed))

    torch.testing.assert_close(apply(moved, x), apply(expert, x), rtol=1e-12, atol=1e-12)


@PROPERTY
@given(**SHAPES, **KINDS)
def test_any_permutation_leaves_the_function_unchanged_in_fp32(
    neurons: int, hidden: int, seed: int, gated: bool, biases: bool
) -> None:
    expert = random_expert(neurons, hidden, seed, gated=gated, biases=biases)
    x = random_input(5, hidden, seed + 1)
    expected = apply(expert, x)

    found = apply(expert.permuted(random_permutation(neurons, seed)), x)

    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@PROPERTY
@given(**SHAPES, **KINDS)
def test_a_permutation_and_its_inverse_restore_every_bit(
    neurons: int, hidden: int, seed: int, gated: bool, biases: bool
) -> None:
    expert = random_expert(neurons, hidden, seed, gated=gated, biases=biases)
    permutation = random_permutation(neurons, seed)

    assert same(expert.permuted(permutation).permuted(permutation.argsort()), expert)


def test_new_neuron_i_is_old_neuron_permutation_i() -> None:
    expert = random_expert(3, 4, 0, biases=True)

    moved = expert.permuted(torch.tensor([2, 0, 1]))

    assert moved.gate is not None and expert.gate is not None
    assert moved.gate[0].equal(expert.gate[2])
    assert moved.up[1].equal(expert.up[0])
    assert moved.down[:, 2].equal(expert.down[:, 1])


def test_a_fused_gate_up_matrix_permutes_like_its_two_halves() -> None:
    expert, permutation = random_expert(6, 4, 0), random_permutation(6, 1)
    assert expert.gate is not None
    fused = torch.cat([expert.gate, expert.up])[torch.cat([permutation, permutation + 6])]

    moved = expert.permuted(permutation)

    assert moved.gate is not None
    assert torch.cat([moved.gate, moved.up]).equal(fused)


def test_permuting_only_one_matrix_would_change_the_function() -> None:
    expert, x = random_expert(8, 6, 0), random_input(5, 6, 1)
    permutation = torch.arange(8).roll(1)

    broken = Expert(up=expert.up[permutation], down=expert.down, gate=expert.gate)

    assert float((apply(broken, x) - apply(expert, x)).norm()) > 0.5 * float(
        apply(expert, x).norm()
    )


@pytest.mark.parametrize(
    "indices", [[0, 0, 2], [0, 1], [0, 1, 3], [-1, 0, 1], [0, 1, 2, 3], []], ids=str
)
def test_what_is_no_bijection_is_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="not a permutation of 3 neurons"):
        random_expert(3, 4, 0).permuted(torch.tensor(indices, dtype=torch.int64))


def test_the_output_bias_does_not_move() -> None:
    expert = random_expert(4, 4, 0, biases=True)

    moved = expert.permuted(torch.tensor([3, 2, 1, 0]))

    assert moved.down_bias is expert.down_bias


def test_tensors_lists_only_what_the_family_has() -> None:
    assert list(random_expert(2, 3, 0, gated=False).tensors()) == ["up", "down"]
    assert list(random_expert(2, 3, 0).tensors()) == ["up", "down", "gate"]


def test_map_reaches_every_tensor() -> None:
    doubled = random_expert(2, 3, 0, biases=True).map(torch.Tensor.double)

    assert {tensor.dtype for tensor in doubled.tensors().values()} == {torch.float64}
    assert len(doubled.tensors()) == 6
