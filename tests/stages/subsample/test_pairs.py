"""Sums over pairs of experts against a slow oracle, and the identities between the errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.subsample.columns import NEURONS, PAIRS, empty_sums
from stages.subsample.pairs import chunk_sums, pair_errors
from tests.tiny import PROPERTY

CASES = {
    "tokens": st.integers(1, 7),
    "experts": st.integers(2, 6),
    "top_k": st.integers(1, 2),
    "hidden": st.integers(1, 5),
    "seed": st.integers(0, 999),
}


def drawn(tokens: int, experts: int, top_k: int, hidden: int, seed: int) -> Any:
    """Outputs [T, E, H], ids [T, k], gates [T, k]; some outputs are zero, some experts equal."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(tokens, experts, hidden, generator=generator).double()
    outputs[:, 0] *= seed % 3 > 0
    outputs[:, -1] = outputs[:, 0] if seed % 5 == 0 else outputs[:, -1]
    scores = torch.rand(tokens, experts, generator=generator).double()
    gates, ids = scores.topk(top_k)
    return outputs, ids, gates


def dense(ids: torch.Tensor, gates: torch.Tensor, experts: int) -> np.ndarray[Any, Any]:
    return torch.zeros(len(ids), experts).double().scatter(1, ids, gates).numpy()


@PROPERTY
@given(**CASES)
def test_sums_of_a_chunk_are_those_of_a_slow_oracle(**case: int) -> None:
    outputs, ids, gates = drawn(**case)
    f, g, experts = outputs.numpy(), dense(ids, gates, case["experts"]), case["experts"]
    expected = empty_sums(experts, case["hidden"], 1)
    for t in range(case["tokens"]):
        for i in range(experts):
            norm = np.linalg.norm(f[t, i])
            expected["sampled"][i] += 1
            expected["mean_output"][i] += f[t, i]
            expected["output_sq"][i] += norm**2
            expected["gated_energy"][i] += g[t, i] ** 2 * norm**2
            if i in ids[t]:
                expected["sampled_selected"][i] += 1
                expected["routed_output"][i] += f[t, i]
            for j in range(experts):
                distance = np.sum((f[t, i] - f[t, j]) ** 2)
                product, other = f[t, i] @ f[t, j], np.linalg.norm(f[t, j])
                expected["swap"][i, j] += g[t, i] ** 2 * distance
                expected["both"][i, j] += g[t, i] * g[t, j] * distance
                expected["gated_gram"][i, j] += g[t, i] * g[t, j] * product
                expected["output_gram"][i, j] += product
                expected["cosine"][i, j] += product / (norm * other) if norm * other else 0

    found = {name: value.numpy() for name, value in chunk_sums(outputs, ids, gates).items()}

    for name, values in found.items():
        assert values.dtype == expected[name].dtype, name
        np.testing.assert_allclose(values, expected[name], rtol=1e-10, atol=1e-10, err_msg=name)
    assert set(expected) - set(found) == set(NEURONS)
    for name in PAIRS:
        assert name == "swap" or np.array_equal(found[name], found[name].T), name


@PROPERTY
@given(**CASES, shares=st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_errors_are_those_of_the_outputs_they_stand_for(shares: list[float], **case: int) -> None:
    outputs, ids, gates = drawn(**case)
    f, g = outputs.numpy(), dense(ids, gates, case["experts"])
    sums = {name: value.numpy() for name, value in chunk_sums(outputs, ids, gates).items()}
    errors = pair_errors(sums["swap"], sums["both"])

    def cost(i: int, j: int, share: float) -> float:
        """Both experts replaced by one mixture under the sum of their gates."""
        mixed = share * f[:, i] + (1 - share) * f[:, j]
        before = g[:, i, None] * f[:, i] + g[:, j, None] * f[:, j]
        return float(np.sum((before - (g[:, i] + g[:, j])[:, None] * mixed) ** 2))

    for i in range(case["experts"]):
        for j in range(case["experts"]):
            if i == j:
                assert errors.merge[i, j] == errors.remap[i, j] == 0
                continue
            best = float(errors.weight[i, j])
            np.testing.assert_allclose(errors.merge[i, j], cost(i, j, best), rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(errors.remap[i, j], cost(i, j, 1.0), rtol=1e-8, atol=1e-9)
            assert all(errors.merge[i, j] <= cost(i, j, share) + 1e-9 for share in shares)
            assert 0 <= best <= 1 or case["tokens"] == 0


@PROPERTY
@given(**CASES)
def test_the_errors_are_the_textbook_ones(**case: int) -> None:
    sums = {name: value.numpy() for name, value in chunk_sums(*drawn(**case)).items()}
    c, both = sums["swap"], sums["both"]
    errors = pair_errors(c, both)

    a, b = errors.total, c + both
    differs = a > 1e-9
    np.testing.assert_allclose((a - 2 * b + c)[differs], errors.remap[differs], atol=1e-9)
    merged = c[differs] - b[differs] ** 2 / a[differs]
    np.testing.assert_allclose(merged, errors.merge[differs], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(errors.weight + errors.weight.T, 1.0, atol=1e-12)
    assert np.array_equal(errors.merge, errors.merge.T)


def test_what_never_differs_costs_nothing_at_any_weight() -> None:
    zeros = np.zeros((2, 2))
    errors = pair_errors(zeros, zeros)
    assert not errors.merge.any() and not errors.remap.any()
    assert (errors.weight == 0.5).all()
