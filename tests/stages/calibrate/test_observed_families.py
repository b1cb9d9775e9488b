"""Every decoder family is observed as it routes, and computes what it computes unobserved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from models.blocks import find_blocks
from stages.calibrate.observer import Observer, Routed, layer_sums
from tests.tiny import same_bits
from tests.tiny_families import EXPERTS, FAMILIES, LENGTHS, family_model, ragged

# The ways in which transformers can run experts; only the first is looked at from within.
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


@contextmanager
def listening(model: Any) -> Iterator[dict[int, dict[str, Any]]]:
    """Plain hooks: what every router said, and with what its experts were called."""
    found: dict[int, dict[str, Any]] = {layer: {} for layer in find_blocks(model)}
    handles = []
    for layer, block in find_blocks(model).items():

        def said(_: Any, __: Any, output: Any, to: Any = found[layer]) -> None:
            to["logits"], to["gates"], to["ids"] = output

        def given(_: Any, args: Any, to: Any = found[layer]) -> None:
            to["hidden"] = args[0]

        handles.append(block.router.register_forward_hook(said))
        handles.append(block.experts.register_forward_pre_hook(given))
    yield found
    for handle in handles:
        handle.remove()


@torch.inference_mode()
def observed(model: Any) -> tuple[Tensor, dict[int, Routed]]:
    inputs = ragged()
    with Observer(model).observe(inputs["attention_mask"]) as seen:
        logits = model(use_cache=False, **inputs).logits
    return logits, seen


def outputs_of(experts: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """`[T, k, H]`: each token goes through each of its experts alone, with weight one."""
    ranks = [experts(hidden, ids[:, k : k + 1], torch.ones(len(ids), 1)) for k in range(2)]
    return torch.stack(ranks, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_family_is_observed_as_it_routes(family: str) -> None:
    model, keep = family_model(family), ragged()["attention_mask"].reshape(-1)
    with listening(model) as heard:
        before = model(use_cache=False, **ragged()).logits

    logits, seen = observed(model)

    assert same_bits(logits, before)
    assert tuple(seen) == tuple(heard)
    for layer, routed in seen.items():
        said, sums = heard[layer], layer_sums(routed, EXPERTS)
        chosen = said["ids"][keep]
        expected = torch.zeros(len(chosen), EXPERTS).scatter_(1, chosen, 1.0)
        assert routed.logits.equal(said["logits"][keep])
        assert routed.gates.equal(said["gates"][keep]) and routed.ids.equal(chosen)
        assert routed.inputs.equal(said["hidden"][keep])
        assert sums["selected"].tolist() == expected.sum(dim=0).tolist()
        assert sums["co_selected"].tolist() == (expected.T @ expected).tolist()
        assert sums["selected"].sum() == 2 * sum(LENGTHS)
        outputs = outputs_of(find_blocks(model)[layer].experts, routed.inputs, chosen)
        torch.testing.assert_close(routed.norms, outputs.norm(dim=-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(routed.largest, outputs.abs().amax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_another_way_of_running_the_experts_is_observed_alike(
    family: str, implementation: str
) -> None:
    model = family_model(family)
    logits, expected = observed(model)
    model.set_experts_implementation(implementation)

    found_logits, found = observed(model)

    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-5)
    for layer, routed in found.items():
        assert routed.ids.equal(expected[layer].ids)
        for name in ("gates", "norms", "largest"):
            mine, theirs = getattr(routed, name), getattr(expected[layer], name)
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3", "GptOss"])
@torch.inference_mode()
def test_half_precision_logits_are_those_of_the_unobserved_model(
    family: str, dtype: torch.dtype
) -> None:
    model = family_model(family).to(dtype)
    expected = model(use_cache=False, **ragged()).logits

    assert same_bits(observed(model)[0], expected)


def test_layers_that_are_handed_over_are_not_kept() -> None:
    model, mask = family_model("Mixtral"), ragged()["attention_mask"]
    _, expected = observed(model)
    got: dict[int, Routed] = {}

    with Observer(model).observe(mask, got.__setitem__) as seen, torch.inference_mode():
        model(use_cache=False, **ragged())

    assert not seen
    assert all(got[layer].norms.equal(routed.norms) for layer, routed in expected.items())
    assert list(got) == list(expected)
