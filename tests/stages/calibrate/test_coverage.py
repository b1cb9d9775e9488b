"""Experts with few tokens are named, in a text whose length is bounded."""

from __future__ import annotations

import pytest

from stages.calibrate.coverage import shown, warnings
from tests.tiny import statistics_of


def test_unused_and_scarce_experts_are_named_by_layer() -> None:
    layers = [statistics_of(0, [30, 0, 9, 0]), statistics_of(1, [10, 10, 10, 10])]

    found = warnings(layers, 10)

    assert len(found) == 2
    assert found[0].startswith("layer 0: experts [1, 3] received none of 39 calibration tokens")
    assert found[1] == "layer 0: experts [2] received fewer than 10 of 39 calibration tokens"


def test_enough_tokens_are_no_news() -> None:
    assert warnings([statistics_of(0, [32, 33])], 32) == []
    assert warnings([statistics_of(0, [1, 1])], 0) == []


def test_a_large_model_takes_few_lines() -> None:
    layers = [statistics_of(layer, [0, 1] * 128) for layer in range(61)]

    found = warnings(layers, 32)

    assert len(found) == 18
    assert found[8] == (
        "53 more layers, 8 to 60: 6,784 experts received none of the calibration tokens"
    )
    assert all(len(line) < 300 for line in found)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([6], "[6]"),
        ([1, 2], "[1, 2]"),
        ([0, 1, 2, 3, 7], "[0-3, 7]"),
        (list(range(0, 60, 2)), f"[{', '.join(str(i) for i in range(0, 48, 2))}, and 6 more]"),
    ],
)
def test_ids_are_drawn_together(ids: list[int], expected: str) -> None:
    assert shown(ids) == expected
