"""A layer's experts decomposed on what they see, and their second factors solved again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.expert import Expert
from models.expert_function import activation, activations, output
from models.factored import FactoredExpert
from stages.compress.config import CompressConfig
from stages.compress.layer import Seen, compress, compress_layer, errors
from stages.compress.resolve import resolve
from stages.refit.config import RefitConfig
from stages.refit.usage import usage
from tests.tiny import random_expert, random_input

TOKENS, HIDDEN, NEURONS, COUNT = 240, 10, 16, 3
ACT = activation({"hidden_act": "silu"})
SMALL = CompressConfig(rank=3, sparse=0.2)


def experts() -> list[Expert]:
    return [random_expert(NEURONS, HIDDEN, seed) for seed in range(COUNT)]


def seen(idle: int | None = None) -> Seen:
    """Random top-2 routing; no token goes to the expert `idle`."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(TOKENS, COUNT, generator=generator).argsort(dim=1)[:, :2]
    if idle is not None:
        ids[ids == idle] = -1
    gates = torch.rand(TOKENS, 2, generator=generator)
    # A few directions carry most of what enters: there the inputs differ from the weights.
    x = random_input(TOKENS, HIDDEN, 9) * torch.logspace(-1.5, 0.5, HIDDEN)
    return Seen(x, usage(ids, gates, COUNT), ACT)


def layer_output(made: list[Expert] | list[FactoredExpert], sample: Seen) -> Tensor:
    """[N, H] fp64, expert by expert with whole matrices."""
    total = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for expert, use in zip(made, sample.use, strict=True):
        whole = expert.dense() if isinstance(expert, FactoredExpert) else expert
        found = output(whole, activations(whole, sample.hidden[use.tokens], sample.act))
        total.index_add_(0, use.tokens, found.double() * use.gates[:, None])
    return total


def lost(made: list[FactoredExpert], sample: Seen) -> float:
    wanted = layer_output(experts(), sample)
    return float((layer_output(made, sample) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_what_is_seen_makes_the_layer_lose_less(axis: str) -> None:
    sample = seen()
    config = SMALL.model_copy(update={"axis": axis})
    fitted = config.model_copy(update={"whiten": True, "importance": "activations"})

    blind = lost(compress_layer(experts(), config), sample)
    informed = lost(compress_layer(experts(), fitted, sample), sample)

    assert informed < 0.7 * blind


def test_an_expert_without_a_token_is_decomposed_by_its_weights() -> None:
    config = SMALL.model_copy(update={"whiten": True, "importance": "activations"})

    made = compress_layer(experts(), config, seen(idle=1))

    blind = compress(experts()[1], SMALL).dense().tensors()
    for name, tensor in made[1].dense().tensors().items():
        torch.testing.assert_close(tensor, blind[name], rtol=1e-3, atol=1e-3)


def test_the_same_inputs_give_the_same_bytes() -> None:
    config = SMALL.model_copy(update={"whiten": True, "importance": "activations"})

    first, second = (compress_layer(experts(), config, seen()) for _ in range(2))

    for a, b in zip(first, second, strict=True):
        assert all(x.equal(y) for x, y in zip(a.parts(), b.parts(), strict=True))


def test_biases_and_two_matrix_experts_are_kept() -> None:
    biased = random_expert(NEURONS, HIDDEN, 0, biases=True)
    two = random_expert(NEURONS, HIDDEN, 1, gated=False)
    exact = CompressConfig(rank=2, sparse=1.0)

    for expert in (biased, two):
        whole = compress(expert, exact).dense()
        assert whole.tensors().keys() == expert.tensors().keys()
        for name, tensor in expert.tensors().items():
            torch.testing.assert_close(whole.tensors()[name], tensor, rtol=1e-4, atol=1e-5)


def test_errors_are_shares_of_the_energy() -> None:
    exact = [compress(e, CompressConfig(rank=2, sparse=1.0)) for e in experts()]
    none = [compress(e, CompressConfig(rank=1, sparse=0.0)) for e in experts()]

    assert max(errors(experts(), exact)["compress_error"].values()) < 1e-10
    assert all(0.1 < e < 1 for e in errors(experts(), none)["compress_error"].values())


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("limit", [8192, 0])
def test_the_second_factors_fit_the_layer_better(axis: str, limit: int) -> None:
    """Solved together or one after another; nothing but U of the down projections changes."""
    sample, config = seen(), SMALL.model_copy(update={"axis": axis})
    made = compress_layer(experts(), config)
    judges = torch.arange(TOKENS) % 5 == 0
    target = layer_output(experts(), sample)

    solved, facts = resolve(made, target, sample, judges, RefitConfig(joint_limit=limit))

    assert lost(solved, sample) < 0.8 * lost(made, sample)
    assert facts["second_factor"]["after"] < facts["second_factor"]["before"]
    for before, after in zip(made, solved, strict=True):
        assert before.gate is not None and after.gate is not None
        assert after.down.right.equal(before.down.right) and after.down.kept.equal(before.down.kept)
        assert after.gate.left.equal(before.gate.left) and after.up.left.equal(before.up.left)
        assert after.down.left.shape == before.down.left.shape


def test_second_factors_that_fit_already_stay() -> None:
    """The target is what the decomposed experts do, biases included."""
    sample = seen()
    biased = [random_expert(NEURONS, HIDDEN, seed, biases=True) for seed in range(COUNT)]
    made = compress_layer(biased, SMALL)
    target = layer_output(made, sample)

    solved, _ = resolve(made, target, sample, torch.arange(TOKENS) % 5 == 0, RefitConfig())

    for before, after in zip(made, solved, strict=True):
        torch.testing.assert_close(after.down.left, before.down.left, rtol=1e-4, atol=1e-4)


def test_half_precision_with_all_of_s_is_rounded_twice_at_most() -> None:
    """The rounding of U and V lands in S: left are that of S and that of the sum."""
    expert = random_expert(NEURONS, HIDDEN, 0, dtype=torch.bfloat16)

    whole = compress(expert, CompressConfig(rank=4, sparse=1.0)).dense()

    for name, tensor in expert.tensors().items():
        torch.testing.assert_close(whole.tensors()[name], tensor, rtol=2**-7, atol=2**-7)
