"""Sizes of outputs are what a plain formula gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.calibrate import outputs
from stages.calibrate.outputs import sizes_of
from tests.tiny import PROPERTY

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@PROPERTY
@given(rows=st.integers(0, 9), width=st.integers(1, 40), seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", TYPES)
def test_norms_and_largest_components(dtype: torch.dtype, rows: int, width: int, seed: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)

    norms, largest = sizes_of(x)

    assert norms.dtype == largest.dtype == torch.float32
    assert largest.equal(x.float().abs().amax(dim=-1))
    expected = x.double().square().sum(dim=-1).sqrt()
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_cutting_rows_changes_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 7).to(dtype)
    expected = sizes_of(x)
    monkeypatch.setattr(outputs, "_CACHED_ELEMENTS", 20)

    assert all(a.equal(b) for a, b in zip(sizes_of(x), expected, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -0.0])
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype, value: float) -> None:
    norms, largest = sizes_of(torch.tensor([[0.0, value, -0.0]], dtype=dtype))

    for found in (norms, largest):
        torch.testing.assert_close(found, torch.tensor([abs(value)]), equal_nan=True)
