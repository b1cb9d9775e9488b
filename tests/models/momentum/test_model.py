"""MomentumSMoE behaves as a model of transformers: files, generation, checkpointing, Mixtral."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.checkpoint import Checkpoint
from models.momentum.configuration_momentum import MomentumConfig
from models.momentum.modeling_momentum import MomentumForCausalLM
from tests import tiny_momentum
from tests.tiny import random_ids, same_bits
from tests.tiny_momentum import STYLES, VARIANTS, logits

PLAIN = {"mu": 0.0, "gamma": 1.0}
KINDS = [(style, name) for style in STYLES for name in VARIANTS]


def of(style: str, name: str, **fields: object) -> MomentumForCausalLM:
    return tiny_momentum.model(block_style=style, **VARIANTS[name] | fields)


def double(style: str, **fields: object) -> MomentumForCausalLM:
    """Heavy ball in fp64, as far as Mixtral's parts go along."""
    model = of(style, "heavy_ball", **fields).double()
    model.set_experts_implementation("eager")
    return model


# Mixtral ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["heavy_ball", "nag", "complex", "learnable"])
def test_without_momentum_the_logits_are_mixtrals_bit_for_bit(
    name: str, dtype: torch.dtype
) -> None:
    """M1, M11: mu = 0 and gamma = 1 leave the plain residual."""
    model = tiny_momentum.model(**VARIANTS[name] | PLAIN | {"mu_imaginary": 0.0}).to(dtype)
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):
            parameter.data.fill_(1.0)

    assert same_bits(logits(model), logits(tiny_momentum.mixtral().to(dtype)))


def test_a_mixtral_checkpoint_opens(tmp_path: Path) -> None:
    mixtral = tiny_momentum.mixtral(sliding_window=5)
    mixtral.save_pretrained(tmp_path)
    config = MomentumConfig.from_pretrained(tmp_path, **PLAIN)

    opened, info = MomentumForCausalLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )

    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_bits(logits(opened.eval()), logits(mixtral))


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes_are_mixtrals_unless_the_step_is_learnt(name: str) -> None:
    """M12."""
    found = {key: t.shape for key, t in of("pre_ln", name).state_dict().items()}
    mixtral = {key: t.shape for key, t in tiny_momentum.mixtral().state_dict().items()}

    extra = {f"model.layers.{layer}.momentum.gamma" for layer in range(3)}
    assert found.keys() - mixtral.keys() == (extra if name == "learnable" else set())
    assert all(found[key] == shape for key, shape in mixtral.items())


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("style", "name"), KINDS)
def test_a_saved_model_computes_the_same(style: str, name: str, tmp_path: Path) -> None:
    model = of(style, name)
    model.save_pretrained(tmp_path)

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    assert type(again) is MomentumForCausalLM
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert same_bits(logits(again), logits(model))


def test_experts_are_stored_one_by_one_as_mixtrals(tmp_path: Path) -> None:
    of("pre_ln", "heavy_ball").save_pretrained(tmp_path / "momentum")
    tiny_momentum.mixtral().save_pretrained(tmp_path / "mixtral")

    found, mixtral = (Checkpoint.open(tmp_path / each).tensors for each in ("momentum", "mixtral"))

    assert {name: info.shape for name, info in found.items()} == {
        name: info.shape for name, info in mixtral.items()
    }
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in found


_FRESH = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
ids = torch.arange(9).reshape(1, 9)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "models.momentum" not in sys.modules
torch.save(model(input_ids=ids).logits.detach(), sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


@pytest.mark.slow
def test_the_folder_opens_without_coalesce(tmp_path: Path) -> None:
    """The code beside the weights is enough, and what it saves opens again."""
    model = of("post_ln", "robust")
    model.save_pretrained(tmp_path / "saved")

    subprocess.run(
        [sys.executable, "-I", "-c", _FRESH, tmp_path / "saved", tmp_path / "out", tmp_path / "re"],
        check=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
    )

    with torch.inference_mode():
        expected = model(input_ids=torch.arange(9).reshape(1, 9)).logits
    assert same_bits(torch.load(tmp_path / "out"), expected)
    names = [Checkpoint.open(tmp_path / each).tensors.keys() for each in ("saved", "re")]
    assert names[0] == names[1]


# Running ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("style", "name"), KINDS)
@torch.inference_mode()
def test_decoding_with_a_cache_needs_no_momentum_of_earlier_tokens(style: str, name: str) -> None:
    """M7: token by token with a KV cache as all at once; M6: later tokens change nothing."""
    model, ids = of(style, name), random_ids(2, 9)
    whole = model(input_ids=ids, use_cache=False).logits
    cache, steps = None, []
    for position in range(9):
        out = model(input_ids=ids[:, position : position + 1], past_key_values=cache)
        cache = out.past_key_values
        steps.append(out.logits)

    # Where u is near zero, the Adam direction turns a rounding of u into a thousand times as much.
    near = {"atol": 1e-3 if name == "adam" else 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **near)
    torch.testing.assert_close(model(input_ids=ids[:, :5]).logits, whole[:, :5], **near)


@pytest.mark.parametrize("style", STYLES)
def test_generation_is_the_same_with_and_without_a_cache(style: str) -> None:
    model, prompt = of(style, "heavy_ball"), random_ids(2, 5)

    found = [model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cached)
             for cached in (True, False)]  # fmt: skip

    assert found[0].shape == (2, 11) and found[0].equal(found[1])


@pytest.mark.parametrize(("style", "name"), KINDS)
@torch.inference_mode()
def test_nothing_is_kept_from_one_forward_to_the_next(style: str, name: str) -> None:
    """M5: no state in buffers, none between calls or rows of a batch."""
    model = of(style, name)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    first, _, again = logits(model), logits(model, length=5), logits(model)

    assert same_bits(first, again)
    assert all(same_bits(value, buffers[key]) for key, value in model.named_buffers())
    alone = model(input_ids=random_ids(2, 9)[1:], use_cache=False).logits
    torch.testing.assert_close(alone, first[1:], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_hidden_states_and_router_logits_come_without_momentum(style: str) -> None:
    model = of(style, "complex")

    out = model(input_ids=random_ids(2, 9), output_hidden_states=True, output_router_logits=True)
    listed = model.model(input_ids=random_ids(2, 9), output_hidden_states=True, return_dict=False)

    assert [each.shape for each in out.hidden_states] == [(2, 9, 32)] * 4
    assert [each.shape for each in out.router_logits] == [(18, 4)] * 3
    assert all(a.equal(b) for a, b in zip(listed[-1], out.hidden_states, strict=True))


def gradients(model: MomentumForCausalLM, **how: object) -> dict[str, Tensor]:
    if how:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model.train()
    ids = random_ids(2, 9)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("style", "name"), KINDS)
def test_gradients_are_the_same_with_checkpointing(style: str, name: str, reentrant: bool) -> None:
    """M13: momentum reaches the recomputed layer, whichever way torch recomputes."""
    plain = gradients(of(style, name))

    found = gradients(of(style, name), use_reentrant=reentrant)

    assert plain.keys() == found.keys() and len(plain) > 20
    assert [key for key in plain if not same_bits(plain[key], found[key])] == []


@pytest.mark.parametrize("style", STYLES)
def test_momentum_carries_gradients_to_the_first_experts(style: str) -> None:
    """M13: their gradient is not that of mu = 0, and agrees with finite differences."""
    name = "model.layers.0.mlp.experts.down_proj"
    model = double(style)
    found = gradients(model)[name]
    assert not torch.allclose(found, gradients(double(style, mu=0.0))[name])

    weight, ids = model.get_parameter(name), random_ids(2, 9)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.manual_seed(0))
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            weight.add_(direction, alpha=sign * 1e-3)
            logits = model(input_ids=ids, use_cache=False).logits  # its loss is in fp32
            losses.append(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
            weight.sub_(direction, alpha=sign * 1e-3)
    slope = (losses[0] - losses[1]) / 2e-3
    torch.testing.assert_close((found * direction).sum(), slope, rtol=5e-3, atol=0)


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_style": "mid_ln"}, "known are pre_ln, post_ln"),
        ({"momentum_kind": "adagrad"}, "known: heavy_ball"),
        ({"mu": 1.0}, "below 1"),
        ({"momentum_kind": "complex", "mu": 0.8, "mu_imaginary": 0.7}, "below 1"),
        ({"block_style": "post_ln", "router_jitter_noise": 0.1}, "no jitter"),
    ],
)
def test_a_config_that_cannot_work_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_momentum.config(**fields)
