"""Methods get what they need from a real checkpoint, and nothing that they do not need."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.moe import MoeCheckpoint
from stages.calibrate.statistics import LayerStatistics
from stages.group.provide import input_distances, provide
from tests.stages.group.observed import random_layer
from tests.tiny import EXPERTS, random_expert, save_tiny


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path_factory.mktemp("m") / "model", "mixtral"))


def bare(layer: int) -> LayerStatistics:
    full = random_layer(EXPERTS, layer, layer=layer)
    return LayerStatistics(layer, full.sums)


def test_only_what_is_needed_is_attached(moe: MoeCheckpoint) -> None:
    sums = {layer: random_layer(EXPERTS, layer).subsample or {} for layer in moe.layers}
    layers = [bare(layer) for layer in moe.layers]

    for need in ("subsample", "router", "weights"):
        for each in provide([need], layers, moe, sums):
            given = {"subsample": each.subsample, "router": each.router, "weights": each.weights}
            assert {name for name, value in given.items() if value is not None} == {need}
    assert provide([], layers, moe, sums) == layers


def test_router_rows_are_those_of_the_layer(moe: MoeCheckpoint) -> None:
    for each in provide(["router"], [bare(layer) for layer in moe.layers], moe, {}):
        assert each.router is not None
        assert each.router.dtype == np.float64
        assert np.array_equal(each.router, moe.read_router(each.layer).double().numpy())


def test_distances_are_those_of_gate_and_up(moe: MoeCheckpoint) -> None:
    (found,) = provide(["weights"], [bare(1)], moe, {})
    experts = moe.read_experts(1, list(range(EXPERTS)))

    for i, a in enumerate(experts):
        for j, b in enumerate(experts):
            assert a.gate is not None and b.gate is not None and found.weights is not None
            expected = (a.gate - b.gate).square().sum() + (a.up - b.up).square().sum()
            assert found.weights[i, j] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 700, 1 << 20])
@pytest.mark.parametrize("gated", [True, False])
def test_distances_hold_in_any_chunks_and_for_near_copies(
    monkeypatch: pytest.MonkeyPatch, chunk: int, gated: bool
) -> None:
    monkeypatch.setattr("stages.group.provide._CHUNK_BYTES", chunk)
    base = random_expert(7, 5, 0, gated=gated, biases=True)
    near = base.map(lambda tensor: tensor + 1e-3)
    far = random_expert(7, 5, 1, gated=gated, biases=True)

    found = input_distances([base, near, far])

    # 1e-3 on every entry of up and gate, and of their biases.
    entries = (7 * 5 + 7) * (2 if gated else 1)
    assert found[0, 1] == pytest.approx(entries * 1e-6, rel=1e-2)
    assert found[0, 2] > 10
    assert np.array_equal(found, found.T)
    down = base.map(torch.clone)
    down.down.zero_()
    assert input_distances([base, down])[0, 1] == 0
