"""What the observer adds up is what the model did, and watching changes nothing.

The oracle reads the model with plain hooks and then goes token by token and expert by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.calibrate.observer import (
    INTEGERS,
    SCALARS,
    VECTORS,
    Observer,
    Routed,
    Sums,
    add,
    empty_sums,
    layer_sums,
    moe_blocks,
)
from tests.tiny import (
    EXPERTS,
    FAMILIES,
    MOE_LAYERS,
    PROPERTY,
    TOP_K,
    random_ids,
    tiny_model,
)

LENGTHS = (9, 4, 1, 7)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def padded(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S] ids, mask and positions of four rows of different lengths."""
    rows = [random_ids(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
    ids = torch.zeros(len(rows), 12, dtype=torch.int64)
    mask = torch.zeros(len(rows), 12, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(12 - len(row), 12)
        ids[i, where], mask[i, where] = row, True
    return ids, mask, (mask.long().cumsum(dim=1) - 1).clamp(min=0)


@torch.inference_mode()
def observed(model: Any, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> Any:
    with Observer(model).observe(mask) as seen:
        model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return {layer: layer_sums(routed, EXPERTS) for layer, routed in seen.items()}


@contextmanager
def recorded(model: Any) -> Iterator[dict[int, dict[str, Any]]]:
    """Plain hooks: what went into every MoE block and what its router said."""
    found: dict[int, dict[str, Any]] = {}
    handles = []
    for layer, block in moe_blocks(model).items():
        record = found.setdefault(layer, {})

        def entering(_: Any, args: Any, record: dict[str, Any] = record) -> None:
            record["input"] = args[0].reshape(-1, args[0].shape[-1])

        def routed(_: Any, __: Any, output: Any, record: dict[str, Any] = record) -> None:
            record["logits"], record["gates"], record["ids"] = output

        handles.append(block.register_forward_pre_hook(entering))
        handles.append(block.get_submodule("gate").register_forward_hook(routed))
    yield found
    for handle in handles:
        handle.remove()


def slow_sums(block: Any, record: dict[str, Any], keep: Tensor) -> Sums:
    """The statistics of one layer, written as loops in double precision."""
    sums, weights = empty_sums(EXPERTS), block.experts
    for token in keep.reshape(-1).nonzero().reshape(-1).tolist():
        x, z = record["input"][token].double(), record["logits"][token].double().numpy()
        chosen = record["ids"][token].tolist()
        gates = record["gates"][token].double().tolist()
        sums["tokens"] += 1
        sums["logit_gram"] += np.outer(z, z)
        for expert, g in zip(chosen, gates, strict=True):
            gate, up = (weights.gate_up_proj[expert].double() @ x).chunk(2)
            f = weights.down_proj[expert].double() @ (F.silu(gate) * up)
            norm = float(f.square().sum().sqrt())
            sums["selected"][expert] += 1
            sums["gate"][expert] += g
            sums["gate_sq"][expert] += g * g
            sums["norm"][expert] += norm
            sums["norm_sq"][expert] += norm * norm
            sums["gate_norm"][expert] += g * norm
            sums["max_abs"][expert] = max(sums["max_abs"][expert], float(f.abs().max()))
            for other, h in zip(chosen, gates, strict=True):
                sums["co_selected"][expert, other] += 1
                sums["gate_product"][expert, other] += g * h
    return sums


@pytest.mark.parametrize("side", ["none", "right", "left"])
@torch.inference_mode()
def test_statistics_equal_those_of_a_loop_over_tokens_and_experts(model: Any, side: str) -> None:
    if side == "none":
        ids, positions = random_ids(3, 10), None
        mask = torch.ones_like(ids, dtype=torch.bool)
    else:
        ids, mask, positions = padded(side)
    with recorded(model) as records:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            output_router_logits=True,
        )

    found = observed(model, ids, mask, positions)

    assert tuple(found) == tuple(records) == MOE_LAYERS[model.config.model_type]
    for (layer, record), logits in zip(records.items(), output.router_logits, strict=True):
        assert record["logits"].equal(logits)
        expected = slow_sums(moe_blocks(model)[layer], record, mask)
        for name in SCALARS + VECTORS:
            if name in INTEGERS:
                assert np.array_equal(found[layer][name], expected[name]), name
            else:
                np.testing.assert_allclose(
                    found[layer][name], expected[name], rtol=2e-5, atol=2e-5, err_msg=name
                )


def test_padding_on_any_side_or_none_gives_the_same_counts(model: Any) -> None:
    left, right = observed(model, *padded("left")), observed(model, *padded("right"))
    none = {layer: empty_sums(EXPERTS) for layer in right}
    for seed, length in enumerate(LENGTHS):
        ids = random_ids(1, length, seed)
        for layer, sums in observed(model, ids, torch.ones_like(ids, dtype=torch.bool)).items():
            add(none[layer], sums)

    for layer in right:
        for name in SCALARS + VECTORS:
            for other in (left, none):
                if name in INTEGERS:
                    assert np.array_equal(other[layer][name], right[layer][name]), name
                else:
                    np.testing.assert_allclose(
                        other[layer][name], right[layer][name], rtol=1e-4, atol=1e-4, err_msg=name
                    )


def test_every_real_token_is_counted_top_k_times(model: Any) -> None:
    ids, mask, positions = padded("right")

    for sums in observed(model, ids, mask, positions).values():
        assert sums["selected"].sum() == sum(LENGTHS) * TOP_K
        assert set(sums["tokens"]) == {sum(LENGTHS)}
        assert np.array_equal(np.diag(sums["co_selected"]), sums["selected"])
        assert sums["co_selected"].sum() == sum(LENGTHS) * TOP_K**2


def test_the_content_of_padding_does_not_matter(model: Any) -> None:
    ids, mask, positions = padded("right")
    other = torch.where(mask, ids, 5)

    first, second = (observed(model, each, mask, positions) for each in (ids, other))

    for layer, sums in first.items():
        for name, values in sums.items():
            if name in INTEGERS:
                assert np.array_equal(values, second[layer][name]), name
            else:
                np.testing.assert_allclose(values, second[layer][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.inference_mode()
def test_watching_moves_no_logit_by_more_than_rounding(model: Any, side: str) -> None:
    """The gates are applied after the experts instead of within: at most 1e-5 of the largest."""
    ids, mask, positions = padded(side)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    before = model(**inputs, use_cache=False).logits[mask]

    with Observer(model).observe(mask):
        during = model(**inputs, use_cache=False).logits[mask]
    after = model(**inputs, use_cache=False).logits[mask]

    assert float((during - before).abs().max()) <= 1e-5 * float(before.abs().max())
    assert after.equal(before)


def hooks_of(model: Any) -> list[Any]:
    """Everything that could have been hung on the MoE blocks; transformers has hooks of its own."""
    modules = [m for block in moe_blocks(model).values() for m in block.modules()]
    hooks = [[*m._forward_hooks, *m._forward_pre_hooks] for m in modules]
    return [*hooks, [vars(module).get("forward") for module in modules]]


def test_the_model_is_left_without_hooks(model: Any) -> None:
    ids, mask, positions = padded("right")
    before = hooks_of(model)

    observed(model, ids, mask, positions)

    assert hooks_of(model) == before


def test_the_model_is_left_without_hooks_after_an_error(model: Any) -> None:
    before = hooks_of(model)

    with pytest.raises(RuntimeError), Observer(model).observe(torch.ones(1, 1, dtype=torch.bool)):
        assert hooks_of(model) != before
        raise RuntimeError

    assert hooks_of(model) == before


def test_only_moe_layers_are_watched() -> None:
    assert tuple(moe_blocks(tiny_model("qwen3_moe"))) == (0, 2)


def test_a_batch_of_padding_alone_adds_nothing(model: Any) -> None:
    ids = random_ids(1, 4)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    with Observer(model).observe(mask) as seen, torch.inference_mode():
        model.model(input_ids=ids, use_cache=False)

    for routed in seen.values():
        assert all(not values.any() for values in layer_sums(routed, EXPERTS).values())


def test_gates_that_are_not_renormalised_are_added_as_the_model_used_them() -> None:
    """OLMoE's two gates sum to less than one, Mixtral's to one."""
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids, dtype=torch.bool)
    renormalised, raw = (observed(tiny_model(f), ids, mask)[0] for f in ("mixtral", "olmoe"))

    assert renormalised["gate"].sum() == pytest.approx(16, rel=1e-6)
    assert raw["gate"].sum() < 15.9


@torch.inference_mode()
def test_half_precision_models_are_observed_in_their_own_routing() -> None:
    model = tiny_model("mixtral", torch.bfloat16)
    ids = random_ids(3, 10)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with recorded(model) as records:
        model(input_ids=ids, use_cache=False)

    found = observed(model, ids, mask)[0]  # later layers see inputs that were rounded otherwise

    expected = slow_sums(moe_blocks(model)[0], records[0], mask)
    assert np.array_equal(found["selected"], expected["selected"])
    assert np.array_equal(found["co_selected"], expected["co_selected"])
    np.testing.assert_allclose(found["logit_gram"], expected["logit_gram"], rtol=1e-12)
    np.testing.assert_allclose(found["gate_norm"], expected["gate_norm"], rtol=2e-2)


def routed_tokens(tokens: int, seed: int) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    gates, ids = logits.softmax(dim=-1).topk(TOP_K, dim=-1)
    outputs = torch.randn(tokens, TOP_K, 5, generator=generator)
    return Routed(logits, ids, gates, outputs, inputs=torch.zeros(tokens, 5))


@PROPERTY
@given(parts=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_partition_of_the_tokens_gives_the_same_sums(parts: list[int], seed: int) -> None:
    whole = routed_tokens(sum(parts), seed)
    total, start = empty_sums(EXPERTS), 0
    for size in parts:
        piece = slice(start, start + size)
        pieces = {name: values[piece] for name, values in vars(whole).items()}
        add(total, layer_sums(Routed(**pieces), EXPERTS))
        start += size

    expected = layer_sums(whole, EXPERTS)

    for name, values in total.items():
        if name in INTEGERS or name == "max_abs":
            assert np.array_equal(values, expected[name]), name
        else:
            scale = float(np.abs(expected[name]).max())
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-12 * scale)


def test_sums_are_integers_and_doubles() -> None:
    for name, values in layer_sums(routed_tokens(4, 0), EXPERTS).items():
        assert values.dtype == (np.int64 if name in INTEGERS else np.float64), name
        assert values.shape == empty_sums(EXPERTS)[name].shape, name
