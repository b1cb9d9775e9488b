"""Operations per token are what torch counts when a model runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.moe import MoeCheckpoint
from orchestrator.flops import per_token
from stages.export.layout import placeholder
from tests.tiny import FAMILIES, random_ids, save_tiny


def counted(folder: Path) -> float:
    """Per token, by torch; of attention, only the products with weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    ids = random_ids(2, 16)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    by_operation = counter.get_flop_counts()["Global"]
    matrices = {k: n for k, n in by_operation.items() if "attention" not in str(k)}
    scores = {k: n for k, n in matrices.items() if "bmm" in str(k)}
    return (sum(matrices.values()) - sum(scores.values())) / ids.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_of_the_first_families(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    assert per_token(MoeCheckpoint.open(folder)) == counted(folder)


def test_half_the_neurons_are_half_the_work_of_the_experts(tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_tiny(tmp_path / "model", "mixtral"))
    whole = placeholder(moe, dict.fromkeys(moe.layers, moe.num_experts))
    neurons = moe.meta_expert(0).neurons
    halved = [replace(each, width=neurons // 2) for each in whole]
    experts = 2 * moe.top_k * 3 * neurons * moe.hidden_size * len(moe.layers)
    assert per_token(moe, whole) == per_token(moe)
    assert per_token(moe) - per_token(moe, halved) == experts // 2
