"""Widths at which a native checkpoint would open and not run."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from orchestrator.load import load
from orchestrator.preflight import prepare
from stages.errors import BudgetError
from stages.group.width import ALIGNED, HALF_ALIGNED
from tests.orchestrator.tiny_run import Inputs


def planned(inputs: Inputs, keep: float, form: str = "native") -> tuple[str, ...]:
    """Notes of a run that leaves so much of 16 neurons."""
    group = {"method": "coalesce", "multiple": 1, "budget": {"keep_ratio": keep}}
    return prepare(load(str(inputs.recipe(group=group, export__format=form))).config).notes


@pytest.mark.parametrize(("kind", "step"), [("float32", ALIGNED), ("bfloat16", HALF_ALIGNED)])
def test_kernels_want_what_the_rule_says(kind: str, step: int) -> None:
    def runs(width: int) -> bool:
        config = MixtralConfig(
            hidden_size=32,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=64,
        )
        model = MixtralForCausalLM(config).to(getattr(torch, kind))
        try:
            model(input_ids=torch.arange(16)[None])
        except RuntimeError as error:
            assert "16 bytes" in str(error)
            return False
        return True

    assert [width for width in range(2, 17, 2) if runs(width)] == list(range(step, 17, step))


def test_a_width_that_runs_nowhere_is_refused_before_anything_is_done(inputs: Inputs) -> None:
    with pytest.raises(BudgetError, match="experts of 5 neurons") as refused:
        planned(inputs, 0.3125)
    assert "group.multiple=8" in refused.value.remedy
    assert not inputs.run_dir.exists()


def test_one_that_does_not_run_in_the_stored_type_is_refused_as_well(inputs: Inputs) -> None:
    model = MixtralForCausalLM.from_pretrained(inputs.model, dtype=torch.bfloat16)
    model.save_pretrained(inputs.model)
    with pytest.raises(BudgetError, match="experts of 12 neurons"):
        planned(inputs, 0.75)
    assert planned(inputs, 0.75, "mapped") == planned(inputs, 0.5) == ()


def test_one_that_runs_in_float32_alone_is_noted(inputs: Inputs) -> None:
    assert "experts of 12 neurons" in " ".join(planned(inputs, 0.75))
    assert planned(inputs, 0.5) == planned(inputs, 0.75, "mapped") == ()
