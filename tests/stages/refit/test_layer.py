"""One layer reduced and refitted, on what really enters it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.expert import Expert
from models.moe import MoeCheckpoint
from stages.inputs.read import LayerInputs
from stages.narrow.config import NarrowConfig
from stages.refit.config import PolishConfig, RefitConfig
from stages.refit.layer import Reduction, held_out, reduce_experts, target_of
from tests.tiny import EXPERTS, HIDDEN, TOP_K, apply, save_tiny

TOKENS, LAYER = 600, 0
NARROW = NarrowConfig(ridge=1e-6)
CLOSED = PolishConfig(steps=0)
OFF = RefitConfig(enabled=False)
ON = RefitConfig(enabled=True, strengths=(1e-4, 1e-2), polish=CLOSED)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path_factory.mktemp("mixtral"), "mixtral"))


def sample(tokens: int = TOKENS, experts: int = EXPERTS) -> LayerInputs:
    """Random inputs with random routing."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    logits = torch.randn(tokens, experts, generator=generator)
    gates, ids = logits.softmax(dim=-1).topk(TOP_K)
    return LayerInputs(
        layer=LAYER,
        hidden=hidden,
        ids=ids,
        gates=gates / gates.sum(dim=-1, keepdim=True),
        logits=logits,
        block=torch.arange(tokens) // 10,
        position=(torch.arange(tokens) % 10).int(),
        domain=torch.zeros(tokens, dtype=torch.int32),
        domains=("any",),
        seed=0,
        inputs={},
    )


def experts_of(moe: MoeCheckpoint) -> list[Expert]:
    return moe.read_experts(LAYER, list(range(moe.num_experts)))


def layer_output(experts: Sequence[Expert], ids: Tensor, gates: Tensor, x: Tensor) -> Tensor:
    """Token by token, choice by choice: the oracle."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for expert, gate in zip(ids[token].tolist(), gates[token].tolist(), strict=True):
            if expert >= 0:
                made = apply(experts[expert].map(Tensor.double), x[token : token + 1].double())
                total[token] += gate * made[0]
    return total


def reduced(
    moe: MoeCheckpoint,
    inputs: LayerInputs,
    experts: Sequence[Expert],
    ids: Tensor,
    width: int | None = None,
    refit: RefitConfig = OFF,
) -> Reduction:
    routing = ids, inputs.gates
    return reduce_experts(moe, experts, width, inputs, routing, NARROW, refit)


def test_the_target_is_what_the_layer_does(moe: MoeCheckpoint) -> None:
    inputs = sample(40)

    expected = layer_output(experts_of(moe), inputs.ids, inputs.gates, inputs.hidden)

    torch.testing.assert_close(target_of(moe, inputs), expected, rtol=1e-4, atol=1e-6)


def with_idle_neurons(experts: Sequence[Expert], keep: int) -> list[Expert]:
    """Planted: neurons behind the first `keep` repeat earlier ones, with a down column of their
    own, so that exactly the narrow expert can do the same."""
    neurons = torch.arange(experts[0].neurons) % keep
    return [replace(e.select(neurons), down=e.down) for e in experts]


def test_planted_neurons_that_repeat_others_are_removed_without_loss(moe: MoeCheckpoint) -> None:
    inputs, original = sample(), experts_of(moe)
    keep = original[0].neurons // 2
    planted = with_idle_neurons(original, keep)

    found = reduced(moe, inputs, planted, inputs.ids, keep)

    assert {expert.neurons for expert in found.experts} == {keep}
    some = slice(0, 30)
    before, after = (
        layer_output(experts, inputs.ids[some], inputs.gates[some], inputs.hidden[some])
        for experts in (planted, found.experts)
    )
    assert float((before - after).norm() / before.norm()) < 1e-3
    assert found.facts["narrow_error"] < 1e-4


def test_full_width_without_a_refit_changes_no_bit(moe: MoeCheckpoint) -> None:
    inputs, experts = sample(), experts_of(moe)

    found = reduced(moe, inputs, experts, inputs.ids, experts[0].neurons)

    for before, after in zip(experts, found.experts, strict=True):
        assert all(t.equal(after.tensors()[name]) for name, t in before.tensors().items())


def test_a_refit_of_what_fits_already_changes_nothing(moe: MoeCheckpoint) -> None:
    inputs, experts = sample(), experts_of(moe)

    found = reduced(moe, inputs, experts, inputs.ids, refit=ON)

    assert found.facts["error_after"] <= found.facts["error_before"] < 1e-10
    for before, after in zip(experts, found.experts, strict=True):
        torch.testing.assert_close(after.down, before.down, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("joint_limit", [10**6, 0])
def test_the_refit_finds_lost_down_projections(moe: MoeCheckpoint, joint_limit: int) -> None:
    """One expert is gone, and what the others put out was damaged."""
    inputs = sample()
    kept = [replace(expert, down=expert.down.roll(1, 0)) for expert in experts_of(moe)[:-1]]
    ids = torch.where(inputs.ids < len(kept), inputs.ids, -1)
    config = ON.model_copy(update={"joint_limit": joint_limit})

    found = reduced(moe, inputs, kept, ids, refit=config)

    target = target_of(moe, inputs)
    errors = [
        float((target - layer_output(each, ids, inputs.gates, inputs.hidden)).norm())
        for each in (kept, found.experts)
    ]
    assert errors[1] < 0.8 * errors[0]
    size = float(target.norm())
    assert found.facts["error_before"] == pytest.approx((errors[0] / size) ** 2, rel=1e-3)
    assert found.facts["error_after"] == pytest.approx((errors[1] / size) ** 2, rel=1e-3)
    assert found.facts["held_out_after"] < found.facts["held_out_before"]


def test_an_expert_with_few_tokens_borrows_the_layers(moe: MoeCheckpoint) -> None:
    inputs, experts = sample(), experts_of(moe)
    never = 2
    ids = torch.where(inputs.ids == never, (never + 1) % EXPERTS, inputs.ids)

    found = reduced(moe, inputs, experts, ids, experts[0].neurons // 2)

    assert found.facts["few_tokens"] == [never]
    assert all(t.isfinite().all() for t in found.experts[never].tensors().values())
    assert bool(found.experts[never].down.any())


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_held_out_blocks_are_whole(share: float) -> None:
    inputs = sample(400)

    chosen = held_out(inputs, share)

    for block in inputs.block.unique():
        assert chosen[inputs.block == block].unique().numel() == 1
    assert float(chosen.float().mean()) == pytest.approx(share, abs=0.03)


def test_a_single_block_is_split_by_tokens() -> None:
    inputs = replace(sample(50), block=torch.zeros(50, dtype=torch.int64))

    assert 0 < int(held_out(inputs, 0.2).sum()) < 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_type_stays(tmp_path: Path, dtype: torch.dtype) -> None:
    moe = MoeCheckpoint.open(save_tiny(tmp_path, "qwen3_moe", dtype))
    inputs = replace(sample(), hidden=sample().hidden.to(dtype))
    experts = experts_of(moe)

    found = reduced(moe, inputs, experts, inputs.ids, experts[0].neurons // 2, ON)

    assert {t.dtype for e in found.experts for t in e.tensors().values()} == {dtype}


def test_gradient_steps_are_kept_where_held_out_tokens_gain(moe: MoeCheckpoint) -> None:
    """Gate projections were damaged, which no down projection can make good."""
    inputs = sample(2000)
    experts = [replace(each, gate=0.4 * _gate(each)) for each in experts_of(moe)]

    closed, polished, wild = (
        reduced(moe, inputs, experts, inputs.ids, refit=ON.model_copy(update={"polish": each}))
        for each in (CLOSED, PolishConfig(steps=150), PolishConfig(steps=3, rate=100.0))
    )

    assert polished.facts["polished"] and not wild.facts["polished"]
    assert polished.facts["held_out_after"] < 0.7 * closed.facts["held_out_after"]
    assert wild.facts["held_out_after"] == pytest.approx(closed.facts["held_out_after"], rel=1e-4)
    for mine, same in zip(closed.experts, wild.experts, strict=True):
        assert mine.down.equal(same.down)


def _gate(expert: Expert) -> Tensor:
    assert expert.gate is not None
    return expert.gate


def test_the_closed_form_is_solved_on_as_many_tokens_as_are_asked_for(moe: MoeCheckpoint) -> None:
    """Every third of 600 tokens: what comes out is what a sample of these alone gives."""
    inputs, experts = sample(), experts_of(moe)
    damaged = [replace(each, down=each.down.roll(1, 0)) for each in experts]
    unknowns = len(experts) * experts[0].neurons
    third = inputs.only(torch.arange(TOKENS) % 3 == 0)

    few = ON.model_copy(update={"solved_on": 200 / unknowns})
    found = reduced(moe, inputs, damaged, inputs.ids, refit=few)
    plenty = reduced(
        moe, inputs, damaged, inputs.ids, refit=ON.model_copy(update={"solved_on": 1e6})
    )

    assert found.facts["tokens_per_unknown"] == pytest.approx(200 / unknowns)
    alone = reduced(moe, third, damaged, third.ids, refit=ON)
    everything = reduced(moe, inputs, damaged, inputs.ids, refit=ON)
    for mine, same in zip(found.experts, alone.experts, strict=True):
        torch.testing.assert_close(mine.down, same.down)
    for mine, same in zip(plenty.experts, everything.experts, strict=True):
        assert mine.down.equal(same.down)
