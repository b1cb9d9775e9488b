"""One threshold for the S of all layers: best, exact, deterministic; the even division where all
rows are worth the same."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.expert import Expert
from stages.compress.config import CompressConfig
from stages.compress.factor import shape_of
from stages.compress.layer import compress
from stages.compress.scores import SCHEMA, curves, read_curves
from stages.compress.threshold import Curve, share_out
from stages.errors import StatisticsError
from tests.stages.compress.test_layer import seen
from tests.tiny import PROPERTY, random_expert, random_input

SMALL = CompressConfig(rank=2, sparse=0.25, multiple=1, threshold="global")
CURVE = st.tuples(
    st.lists(st.floats(0, 10), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 4)
)


def curve(layer: int, gains: list[float], row_bytes: int, even: int, matrix: str = "up") -> Curve:
    falling = np.array(sorted(gains, reverse=True))
    return Curve(layer, matrix, falling, row_bytes, min(even, len(gains)))


def spent(found: dict[int, dict[str, int]], given_: list[Curve]) -> int:
    return sum(found[each.layer][each.matrix] * each.row_bytes for each in given_)


@PROPERTY
@given(st.lists(CURVE, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_the_bytes_are_kept_and_no_more_can_be_bought(
    made: list[tuple[list[float], int, int]], random: object
) -> None:
    given_ = [curve(layer, *each) for layer, each in enumerate(made)]
    budget = sum(each.even * each.row_bytes for each in given_)

    found = share_out(given_, 1)

    assert spent(found, given_) <= budget
    open_ = [each.row_bytes for each in given_ if found[each.layer]["up"] < len(each.gains)]
    assert budget - spent(found, given_) < min(open_, default=budget + 1)
    shuffled = list(given_)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis's own Random
    assert share_out(shuffled, 1) == found


@PROPERTY
@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=3))
def test_rows_of_one_size_are_divided_as_well_as_can_be(gains: list[list[float]]) -> None:
    given_ = [curve(layer, each, 8, 1) for layer, each in enumerate(gains)]

    found = share_out(given_, 1)

    def worth(rows: tuple[int, ...]) -> float:
        return sum(float(each.gains[:n].sum()) for each, n in zip(given_, rows, strict=True))

    options = [o for o in product(range(4), repeat=len(given_)) if sum(o) == len(given_)]
    best = max(worth(option) for option in options)
    rows = tuple(found[each.layer]["up"] for each in given_)
    assert sum(rows) == len(given_) and worth(rows) == pytest.approx(best)


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=4),
    st.sampled_from([1, 4, 8]),
    st.integers(1, 99),
)
def test_where_all_is_worth_the_same_it_is_the_even_division(
    sizes: list[tuple[int, int]], multiple: int, share: int
) -> None:
    config = CompressConfig(rank=1, sparse=share / 100, multiple=multiple)
    given_ = [
        Curve(layer, "up", np.full(size, float(cost)), cost, shape_of(config, size, 99).kept)
        for layer, (size, cost) in enumerate(sizes)
    ]

    found = share_out(given_, multiple)

    assert {each.layer: {"up": each.even} for each in given_} == found


def test_one_layer_that_needs_all_of_s_gets_it() -> None:
    """Two layers of low rank, which U V gives whole, and one that is far from it."""
    experts = {layer: [low_rank(8, 12, layer + seed) for seed in (0, 50)] for layer in (0, 2)}
    experts[1] = [random_expert(8, 12, seed) for seed in (1, 2)]
    config = SMALL.model_copy(update={"sparse": 1 / 3})
    given_ = [each for layer in range(3) for each in curves(experts[layer], config, layer, None)]

    found = share_out(given_, config.multiple)

    sizes = {each.matrix: len(each.gains) for each in given_}
    budget = sum(each.even * each.row_bytes for each in given_)
    whole = sum(len(each.gains) * each.row_bytes for each in given_ if each.layer == 1)
    assert whole <= budget < 1.1 * whole
    assert found[1] == sizes
    decided = config.model_copy(update={"numbers": found})
    for expert in experts[1]:
        restored = compress(expert, decided, 1).dense().tensors()
        for name, tensor in expert.tensors().items():
            torch.testing.assert_close(restored[name], tensor, rtol=1e-4, atol=1e-5)
    for layer in (0, 2):
        made = compress(experts[layer][0], decided, layer).matrices()
        assert {n: len(each.index) for n, each in made.items()} == found[layer]


def low_rank(neurons: int, hidden: int, seed: int) -> Expert:
    """Every matrix of rank 2, but for noise."""

    def matrix(height: int, width: int, at: int) -> torch.Tensor:
        left, right = random_input(height, 2, at), random_input(2, width, at + 1)
        return left @ right + 1e-4 * random_input(height, width, at + 2)

    sizes = {"gate": (neurons, hidden), "up": (neurons, hidden), "down": (hidden, neurons)}
    return Expert(**{n: matrix(*size, 10 * seed + i) for i, (n, size) in enumerate(sizes.items())})


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("importance", ["weights", "activations"])
def test_curves_fall_and_say_what_dropping_rows_costs(axis: str, importance: str) -> None:
    config = CompressConfig(rank=2, sparse=0.25, axis=axis, importance=importance)
    experts = [random_expert(16, 10, seed) for seed in range(3)]

    found = curves(experts, config, 4, seen() if importance == "activations" else None)

    assert {each.matrix for each in found} == {"gate", "up", "down"}
    tall, wide = (16, 10) if axis == "rows" else (10, 16)
    for each in found:
        assert each.layer == 4 and bool((np.diff(each.gains) <= 1e-12).all())
        along = wide if each.matrix == "down" else tall
        assert len(each.gains) == along and each.row_bytes == 3 * (4 * (26 - along) + 8)
        assert importance == "activations" or 0 < each.gains.sum() < 1


def test_an_expert_that_no_sampled_token_reaches_is_worth_nothing() -> None:
    """Its rows of S are ranked lowest, and nothing breaks (no score of it is read)."""
    config = CompressConfig(rank=2, sparse=0.25, importance="activations")
    experts = [random_expert(16, 10, seed) for seed in range(3)]
    loud = [experts[0], experts[1].map(lambda t: 1e3 * t), experts[2]]

    plain, other = (curves(each, config, 0, seen(idle=1)) for each in (experts, loud))

    for ours, theirs in zip(plain, other, strict=True):
        assert np.array_equal(ours.gains, theirs.gains) and ours.gains.sum() > 0


def test_what_is_no_table_of_scores_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layer-00000.arrow"
    path.write_bytes(b"ARROW1")

    with pytest.raises(StatisticsError, match="cannot read the scores of S"):
        read_curves(path)
    assert SCHEMA.names == ["layer", "matrix", "row_bytes", "even", "gains"]
