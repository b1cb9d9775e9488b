"""The function of an expert, and the comparison with the family's own module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.errors import CheckpointError
from models.expert_function import activation, activations, check_function, output
from models.moe import MoeCheckpoint
from tests.tiny import HIDDEN, apply, random_expert, random_input, save_tiny
from tests.tiny_families import FAMILIES as DECODERS
from tests.tiny_families import save_family


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_the_two_halves_make_the_whole_function(gated: bool, biases: bool) -> None:
    expert = random_expert(5, 7, 1, gated=gated, biases=biases)
    x = random_input(9, 7, 2)

    name = "silu" if gated else "relu"
    neurons = activations(expert, x, activation({"hidden_act": name}))

    assert neurons.shape == (9, 5)
    assert output(expert, neurons).equal(apply(expert, x))


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_passes_in_every_layer(name: str, tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_family(tmp_path, name))
    for layer in moe.layers:
        check_function(moe, layer, random_input(4, moe.hidden_size, layer))


def test_another_function_is_refused_by_numbers(tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_tiny(tmp_path, "mixtral"))
    moe.checkpoint.config["hidden_act"] = "gelu"
    with pytest.raises(CheckpointError, match=r"compute something else.* is allowed") as caught:
        check_function(moe, 0, random_input(4, HIDDEN, 0))
    assert "set calibrate.sample.statistics=false" in str(caught.value.remedy)


def test_a_result_that_is_no_number_is_refused(tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_tiny(tmp_path, "mixtral"))
    with pytest.raises(CheckpointError, match="differ by nan"):
        check_function(moe, 0, torch.full((2, HIDDEN), torch.nan))


def test_an_activation_that_nobody_knows_is_refused() -> None:
    with pytest.raises(CheckpointError, match="names the activation 'no_such'"):
        activation({"hidden_act": "no_such"})
