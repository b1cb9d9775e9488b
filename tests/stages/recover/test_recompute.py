"""Gradient checkpointing: layers pass twice, and the same is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.errors import CheckpointError
from stages.recover.opened import open_student
from stages.recover.recompute import recompute
from stages.recover.trainer import ALONE, Loop
from stages.recover.trainer import train as train_alone
from tests.stages.recover.small import config, make
from tests.stages.recover.test_dealt_out import reduced
from tests.stages.recover.test_seq2seq import made
from tests.stages.recover.test_zero import TOLERANCE, compare, describe, on_ranks
from tests.tiny import tiny_model

ON = {"gradient_checkpointing": True}


@pytest.mark.parametrize("family", ["qwen3_moe", "switch_transformers"])
def test_layers_pass_twice_and_no_bit_of_the_result_changes(tmp_path: Path, family: str) -> None:
    small = make(tmp_path, family) if family == "qwen3_moe" else made(tmp_path, family)
    changes: dict[str, Any] = {"mode": "experts", "steps": 2, "alpha": 0}
    plain = train_alone(describe(small, tmp_path / "plain", **changes)).values
    loop = Loop(describe(small, tmp_path / "again", **changes, **ON), ALONE)
    passes = count(loop.model)
    loop.advance()
    assert set(passes.values()) == {4}, "two parts of a batch, forth and back"
    loop.advance()
    found = loop.ended().values
    assert found.keys() == plain.keys()
    for name, value in found.items():
        assert torch.equal(value, plain[name]), name


def count(model: Any) -> dict[str, int]:
    """Module of experts -> how often it has passed, from now on."""
    found: dict[str, int] = {}

    def watch(name: str, module: Any) -> None:
        found[name] = 0

        def seen(*_: Any) -> None:
            found[name] += 1

        module.register_forward_pre_hook(seen)

    for name, module in model.named_modules():
        if name.endswith("experts"):
            watch(name, module)
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "experts"])
def test_dealt_out_layers_pass_twice_as_well(tmp_path: Path, mode: str) -> None:
    small = reduced(tmp_path / "small")
    changes: dict[str, Any] = {"ranks": 2, "mode": mode, "alpha": 0}
    alone = train_alone(describe(small, tmp_path / "alone", **changes))
    changes |= {"deepspeed": {"zero_stage": 3}}
    assert config(**changes).recomputes
    describe(small, tmp_path / "two", **changes)
    compare(on_ranks(tmp_path / "two"), alone.values)
    describe(small, tmp_path / "kept", **changes, gradient_checkpointing=False)
    for name, value in on_ranks(tmp_path / "kept")[0]["values"].items():
        assert torch.allclose(value, alone.values[name], **TOLERANCE), name


def test_a_family_that_cannot_is_refused_where_it_was_asked_for(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.supports_gradient_checkpointing = False
    recompute(model, config(deepspeed={"zero_stage": 3}), ALONE)
    assert not model.is_gradient_checkpointing
    with pytest.raises(CheckpointError, match="mixtral does not support") as refused:
        recompute(model, config(**ON), ALONE)
    assert "gradient_checkpointing=false" in refused.value.remedy


def test_nothing_within_a_layer_leaves_eval_mode(tmp_path: Path) -> None:
    small = make(tmp_path / "small")
    model = open_student(small.student, config(), ALONE, needs_code=False)
    recompute(model, config(**ON), ALONE)
    training = {name for name, module in model.named_modules() if module.training}
    assert training == {f"model.layers.{index}" for index in range(len(model.model.layers))}
