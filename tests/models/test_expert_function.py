"""The function of an expert, and the comparison with the family's own module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from models.errors import CheckpointError
from models.expert_function import activation, activations, check_function, output
from models.moe import MoeCheckpoint
from tests.tiny import (
    FAMILIES,
    HIDDEN,
    MOE_LAYERS,
    WIDTH,
    apply,
    random_expert,
    random_input,
    save_tiny,
)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_the_two_halves_make_the_whole_function(gated: bool, biases: bool) -> None:
    expert = random_expert(5, 7, 1, gated=gated, biases=biases)
    x = random_input(9, 7, 2)

    neurons = activations(expert, x, F.silu if gated else F.relu)

    assert neurons.shape == (9, 5)
    assert output(expert, neurons).equal(apply(expert, x))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_in_every_layer(family: str, tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_tiny(tmp_path, family, torch.bfloat16))
    for layer in MOE_LAYERS[family]:
        check_function(moe, layer, random_input(4, HIDDEN, layer, torch.bfloat16))


def test_another_layout_is_refused_with_both_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = MoeCheckpoint.open(save_tiny(tmp_path, "mixtral"))
    plain = random_expert(WIDTH, HIDDEN, 0, gated=False)
    monkeypatch.setattr(MoeCheckpoint, "read_expert", lambda *_: plain)
    with pytest.raises(CheckpointError, match=r"gate_up_proj.*supported for") as caught:
        check_function(moe, 0, random_input(4, HIDDEN, 0))
    assert caught.value.remedy == "set calibrate.sample.statistics=false"


def test_a_result_that_is_no_number_is_refused(tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_tiny(tmp_path, "mixtral"))
    with pytest.raises(CheckpointError, match="differ by nan"):
        check_function(moe, 0, torch.full((2, HIDDEN), torch.nan))


@pytest.mark.parametrize("config", [{}, {"hidden_act": "no_such"}, {"hidden_act": None}], ids=str)
def test_an_activation_that_nobody_knows_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="names the activation"):
        activation(config)
