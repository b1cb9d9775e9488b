"""One matrix as U V + S: exact with all of S, as small as the arithmetic, known without memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from models.factored import Factored
from stages.compress.config import CompressConfig
from stages.compress.factor import factor, shape_of
from stages.compress.lowrank import residual, truncated_factors
from stages.compress.sparse import importance, strongest
from tests.stages.compress.test_sparse import masked
from tests.tiny import PROPERTY, random_input

AXES = st.sampled_from(["rows", "columns"])
SIZES = {"height": st.integers(1, 12), "width": st.integers(1, 12), "seed": st.integers(0, 99)}


def slow(weight: Tensor, rank: int, share: float, axis: str) -> Tensor:
    """U V plus S with its other rows zeroed, nothing compacted."""
    left, right = truncated_factors(weight, rank)
    rest = residual(weight, left, right)
    along = len(rest) if axis == "rows" else rest.shape[1]
    index = strongest(importance(rest, axis), int(share * along + 0.5))
    return left @ right + masked(rest, axis, index)


@PROPERTY
@given(data=st.data(), axis=AXES, share=st.sampled_from([0.0, 0.25, 0.5, 1.0]), **SIZES)
def test_it_equals_the_slow_way(
    data: st.DataObject, axis: str, share: float, height: int, width: int, seed: int
) -> None:
    weight = random_input(height, width, seed)
    rank = data.draw(st.integers(1, min(height, width)))
    config = CompressConfig(rank=rank, sparse=share, axis=axis, svd="exact")

    found = factor(weight, config).dense()

    torch.testing.assert_close(found, slow(weight, rank, share, axis), rtol=1e-5, atol=1e-5)
    if share == 1:
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)


@PROPERTY
@given(axis=AXES, share=st.sampled_from([0.0, 0.3, 1.0]), **SIZES)
def test_bytes_are_the_arithmetic_with_and_without_memory(
    axis: str, share: float, height: int, width: int, seed: int
) -> None:
    weight = random_input(height, width, seed, torch.bfloat16)
    config = CompressConfig(ratio=0.5, sparse=share, axis=axis)

    found, predicted = factor(weight, config), factor(weight.to("meta"), config)

    shape = shape_of(config, height, width)
    rank = min(shape.rank, height, width)
    values = rank * (height + width) + shape.kept * (width if axis == "rows" else height)
    for each in (found, predicted):
        assert sum(t.nbytes for t in each.tensors().values()) == 2 * values + 8 * shape.kept
        assert ("s" in each.tensors()) == bool(shape.kept)
    assert {n: (t.shape, t.dtype) for n, t in found.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in predicted.tensors().items()
    }
    assert shape.rank > min(height, width) or shape.values == values


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_kept_rows_are_right_to_half_precision_though_the_factors_were_rounded(axis: str) -> None:
    """S is what the rounded factors leave over."""
    weight = random_input(24, 32, 0, torch.bfloat16)

    found = factor(weight, CompressConfig(rank=4, sparse=0.5, axis=axis))

    dense = found.dense()
    lines, original = (dense, weight) if axis == "rows" else (dense.T, weight.T)
    kept = lines[found.index].float(), original[found.index].float()
    torch.testing.assert_close(*kept, rtol=2**-7, atol=2**-7)
    assert dense.dtype == torch.bfloat16


def test_the_index_ascends_and_rows_belong_to_it() -> None:
    found = factor(random_input(20, 10, 1), CompressConfig(rank=2, sparse=0.3))

    assert found.index.dtype == torch.int64
    assert found.index.tolist() == sorted(set(found.index.tolist()))
    assert isinstance(found, Factored) and found.kept.shape == (6, 10)


@pytest.mark.parametrize("values", [{}, {"rank": 2, "ratio": 0.5}, {"preset": None}])
def test_rank_and_ratio_exclude_each_other(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="either rank"):
        CompressConfig(**values)


def test_the_papers_preset() -> None:
    paper = CompressConfig(preset="paper")
    other = CompressConfig(preset="paper", ratio=0.2, sparse=0.3)

    assert (paper.rank, paper.ratio, paper.sparse) == (32, None, 0.1)
    assert (other.rank, other.ratio, other.sparse) == (None, 0.2, 0.3)
    assert CompressConfig(**paper.model_dump()) == paper


@PROPERTY
@given(height=st.integers(1, 300), width=st.integers(1, 300), share=st.integers(1, 100))
def test_ranks_and_rows_are_multiples_from_the_first_one_on(
    height: int, width: int, share: int
) -> None:
    found = shape_of(CompressConfig(ratio=share / 100, sparse=share / 100), height, width)
    exact = shape_of(
        CompressConfig(ratio=share / 100, sparse=share / 100, multiple=1), height, width
    )

    for ours, theirs, limit in (
        (found.rank, exact.rank, min(height, width)),
        (found.kept, exact.kept, height),
    ):
        assert ours <= limit and abs(ours - theirs) <= 4
        assert ours % 8 == 0 or ours == limit or ours == theirs < 8


def test_the_papers_sizes() -> None:
    """An expert of switch-base: 0.24576 M values of factors, 0.47186 M of S (to whole rows)."""
    config = CompressConfig(preset="paper")

    shapes = [shape_of(config, 3072, 768), shape_of(config, 768, 3072)]

    assert sum(each.rank * (each.height + each.width) for each in shapes) == 245_760
    assert sum(each.kept * each.width for each in shapes) == pytest.approx(471_859, rel=2e-3)
