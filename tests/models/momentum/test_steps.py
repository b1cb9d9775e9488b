"""The arithmetic of the steps: against the equations, the released code, and each other."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import layer_norm

from models.momentum.configuration_momentum import MomentumConfig, robust_rates
from models.momentum.momentum_steps import adam_direction, advanced, looked_ahead
from tests import tiny_momentum
from tests.tiny import random_ids, same_bits
from tests.tiny_momentum import VARIANTS, logits

DEPTH = 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def walk(config: MomentumConfig, start: Tensor, updates: Any) -> list[Tensor]:
    """x_0, x_1, ... with `updates(t, y)` for the output of layer t."""
    found, momentum = [start], start.new_zeros(*start.shape[:2], config.momentum_parts, 4)
    gamma = config.rates.gamma
    for t in range(DEPTH):
        seen = looked_ahead(found[-1], momentum, config.rates, gamma)
        moved, momentum = advanced(
            config, found[-1], updates(t, seen), momentum, gamma, first=t == 0
        )
        found.append(moved)
    return found


def given_updates(t: int, _: Tensor) -> Tensor:
    return noise(1, 2, 4, seed=t + 1)


# Equations ----------------------------------------------------------------------------------------

RATES = st.floats(-0.95, 0.95), st.floats(0.05, 2.0)


@given(*RATES)
def test_gamma_inside_and_outside_the_sum_are_one(mu: float, gamma: float) -> None:
    """M2: x += gamma p with p = u + mu p, or x += m with m = gamma u + mu m."""
    found = walk(tiny_momentum.config(mu=mu, gamma=gamma), noise(1, 2, 4), given_updates)

    x, m = noise(1, 2, 4), torch.zeros(1, 2, 4, dtype=torch.float64)
    for t in range(DEPTH):
        m = gamma * given_updates(t, x) + mu * m
        x = x + m
    torch.testing.assert_close(found[-1], x)


@given(st.floats(-0.99, 0.99), st.floats(0.01, 4.5))
def test_a_linear_field_converges_exactly_within_the_bound_of_lemma_1(
    mu: float, curvature: float
) -> None:
    """M4: with u = -sigma x, |x_t| decays if and only if gamma sigma < 2 + 2 mu."""
    config = tiny_momentum.config(mu=mu)
    found = walk(config, noise(1, 2, 4), lambda t, y: -curvature * y)
    matrix = torch.tensor([[0.0, 1.0], [-mu, 1 + mu - curvature]], dtype=torch.float64)

    torch.testing.assert_close(found[2], (1 + mu - curvature) * found[1] - mu * found[0])
    torch.testing.assert_close(
        found[-1],
        torch.einsum("t,tbsh->bsh", matrix.matrix_power(5)[1], torch.stack(found[:2])),
    )
    radius = float(torch.linalg.eigvals(matrix).abs().max())
    assert (radius < 1) == (curvature < 2 + 2 * mu) or math.isclose(radius, 1, abs_tol=1e-6)


def test_robust_rates_are_those_of_the_released_configuration() -> None:
    """M10."""
    found = robust_rates(0.2, 1.25, 1.0)

    assert found.gamma == pytest.approx(0.96) and found.mu == pytest.approx(0.04)
    assert found.look_ahead == pytest.approx(0.0416667, abs=1e-7)
    vanishing = robust_rates(1e-4, 1.25, 1.0)
    assert vanishing.mu < 1e-11 and vanishing.look_ahead < 1e-11


@pytest.mark.parametrize("kind", ["robust", "nag"])
def test_the_update_is_taken_where_the_look_ahead_points(kind: str) -> None:
    """Equation 16, with the router at y = x + alpha gamma p; Nesterov's alpha is mu."""
    config = tiny_momentum.config(momentum_kind=kind, gamma=0.5)
    rates = config.rates
    seen: list[Tensor] = []

    def update(t: int, y: Tensor) -> Tensor:
        seen.append(y)
        return -0.3 * y

    found = walk(config, noise(1, 2, 4), update)

    p = torch.zeros(1, 2, 4, dtype=torch.float64)
    for t in range(DEPTH):
        y = found[t] + rates.look_ahead * rates.gamma * p
        p = -0.3 * y + rates.mu * p
        torch.testing.assert_close(seen[t], y)
        torch.testing.assert_close(found[t + 1], found[t] + rates.gamma * p)


@given(*RATES)
def test_complex_momentum_is_the_real_part_of_complex_arithmetic(mu: float, gamma: float) -> None:
    fields = {"momentum_kind": "complex", "mu": mu, "gamma": gamma, "mu_imaginary": 0.1}
    found = walk(tiny_momentum.config(**fields), noise(1, 2, 4), given_updates)

    x, p = noise(1, 2, 4), torch.zeros(1, 2, 4, dtype=torch.complex128)
    for t in range(DEPTH):
        p = given_updates(t, x) + complex(mu, 0.1) * p
        x = x + gamma * p.real
    torch.testing.assert_close(found[-1], x)


def test_complex_momentum_without_imaginary_part_is_heavy_ball() -> None:
    """M11."""
    real = tiny_momentum.model(momentum_kind="complex", mu_imaginary=0.0)

    assert same_bits(logits(real), logits(tiny_momentum.model()))


def test_sign_moves_every_component_by_gamma() -> None:
    found = walk(
        tiny_momentum.config(momentum_kind="sign", gamma=0.25), noise(1, 2, 4), given_updates
    )

    assert all(torch.allclose((b - a).abs(), torch.full_like(a, 0.25)) for a, b in pairwise(found))


def test_adams_first_step_is_a_scaled_sign() -> None:
    """M9: sqrt(10) sign(u) within 0.01 for |u| > 0.05, and far less near zero."""
    update = torch.linspace(0.05, 3, 100)

    found = adam_direction(torch.cat([-update, update]), 0.9, 0.999, 1e-8)

    expected = math.sqrt(10) * torch.cat([-torch.ones(100), torch.ones(100)])
    assert (found - expected).abs().max() < 0.01
    assert adam_direction(torch.tensor([0.003]), 0.9, 0.999, 1e-8) == pytest.approx(2.18, abs=0.01)


@pytest.mark.parametrize("style", tiny_momentum.STYLES)
def test_adam_is_heavy_ball_behind_the_first_layer(style: str) -> None:
    """M9: the momentum that later layers see holds the first layer's output."""
    config = tiny_momentum.config(momentum_kind="adam", block_style=style)
    found = walk(config, noise(1, 2, 4), given_updates)

    kept = 0.0 if style == "post_ln" else 1.0
    direction = adam_direction(given_updates(0, found[0]), 0.9, 0.999, 1e-8)
    torch.testing.assert_close(found[1], kept * found[0] + direction)
    p = given_updates(1, found[1]) + 0.7 * given_updates(0, found[0])
    torch.testing.assert_close(found[2], found[1] + p)


# The released block -------------------------------------------------------------------------------


def released_block(layer: Any, h: Tensor, moment: Tensor, *, adam: bool) -> tuple[Tensor, Tensor]:
    """The feed-forward half of a layer as the released code has it, minus sign included."""

    def normalised(norm: Any, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

    core = layer.mlp(h)
    moment = 0.7 * moment + 1.0 * core
    step = moment
    if adam:
        p, v = 0.1 * core, 0.001 * core**2
        step = 1.0 / torch.sqrt(v + 1e-8) * p + h
    s = normalised(layer.post_momentum_layernorm, h - step)
    return normalised(layer.post_feedforward_layernorm, h + s), moment


@pytest.mark.parametrize("kind", ["heavy_ball", "adam"])
@torch.inference_mode()
def test_post_ln_layers_are_the_released_block_with_experts_of_the_other_sign(kind: str) -> None:
    """M14: the released code subtracts what Mixtral's residual adds; training absorbs the sign."""
    model = tiny_momentum.model(block_style="post_ln", momentum_kind=kind)
    embedded = model.model.embed_tokens(random_ids(2, 9))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    h = model.model.layers[0].post_attention_layernorm(embedded)
    moment = torch.zeros_like(h)
    for index, layer in enumerate(model.model.layers):
        h = layer.post_attention_layernorm(h) if index else h
        h, moment = released_block(layer, h, moment, adam=kind == "adam" and index == 0)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.neg_()

    found = model.model(input_ids=random_ids(2, 9), use_cache=False).last_hidden_state

    torch.testing.assert_close(found, model.model.norm(h), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_released_adam_step_forgets_what_came_in() -> None:
    """M9: LayerNorm of the direction alone, since x cancels."""
    config = tiny_momentum.config(momentum_kind="adam", block_style="post_ln")
    update, zeros = noise(1, 2, 4), torch.zeros(1, 2, 1, 4, dtype=torch.float64)

    found = [advanced(config, noise(1, 2, 4, seed=seed), update, zeros, 1.0, first=True)[0]
             for seed in (1, 2)]  # fmt: skip

    assert same_bits(*found)


# Depth --------------------------------------------------------------------------------------------


def without_attention(**fields: object) -> Any:
    model = tiny_momentum.model(num_hidden_layers=DEPTH, **fields)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    return model


def watched(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """x_0 ... x_L and u_0 ... u_L-1 of one forward pass; the last x before the final norm."""
    states: list[Tensor] = []
    updates: list[Tensor] = []
    hooks = [model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    for layer in model.model.layers:
        hooks.append(layer.mlp.register_forward_hook(lambda _, __, out: updates.append(out)))
    with torch.inference_mode():
        out = model(input_ids=random_ids(2, 9), output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [*out.hidden_states[:-1], *states], updates


def test_without_attention_depth_is_a_three_term_recursion() -> None:
    """M3."""
    x, u = watched(without_attention(gamma=0.5))

    for t in range(1, DEPTH):
        torch.testing.assert_close(
            x[t + 1], x[t] + 0.5 * u[t] + 0.7 * (x[t] - x[t - 1]), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", [*VARIANTS])
@torch.inference_mode()
def test_a_dense_layer_passes_momentum_through_untouched(name: str) -> None:
    """M8."""
    model = tiny_momentum.model(dense_layers=[1], **VARIANTS[name])
    passed: list[Tensor] = []
    for layer in model.model.layers[:2]:
        layer.register_forward_hook(lambda _, __, out: passed.append(out[:, :, 1:]))

    logits(model)

    assert same_bits(passed[0], passed[1]) and passed[0].abs().max() > 0
    assert model.model.layers[1].momentum is None


@pytest.mark.parametrize("fields", [{}, {"mu": 0.0}, {"gamma": 0.5}, VARIANTS["complex"]])
def test_error_gains_predict_what_a_small_change_of_an_expert_does(fields: dict[str, Any]) -> None:
    """M15: without attention, and with experts that hardly react to the change themselves."""
    model = without_attention(**fields)
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data.mul_(0.002)
    gains = model.config.error_gains
    x, u = watched(model)
    for t, layer in enumerate(model.model.layers):
        weight = layer.mlp.experts.down_proj.data
        before = weight.clone()
        weight.add_(noise(*weight.shape, seed=t).float(), alpha=1e-3)

        changed, updates = watched(model)

        weight.copy_(before)
        gain = (changed[-1] - x[-1]).norm() / (updates[t] - u[t]).norm()
        assert float(gain) == pytest.approx(gains[t], rel=0.05)
    if not fields:
        assert [round(each, 2) for each in gains.values()] == [2.94, 2.77, 2.53, 2.19, 1.7, 1.0]
