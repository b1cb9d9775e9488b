"""A budget divided between layers may count what becomes of their errors until the model ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.moe import MoeCheckpoint
from stages.calibrate.statistics import LayerStatistics
from stages.group.budget import Sizes
from stages.group.config import Budget, Coalesce, McSmoe
from stages.group.provide import provide
from stages.group.stage import decide
from stages.group.width import Widths
from tests import tiny_momentum
from tests.tiny import save_tiny, statistics_of

GAINS = (2.19, 1.7, 1.0)


def alike(**fields: Any) -> list[LayerStatistics]:
    """Three layers that differ in their gain alone."""
    return [
        replace(statistics_of(layer, [8, 7, 6, 5, 4, 3]), gain=gain, **fields)
        for layer, gain in enumerate(GAINS)
    ]


def test_early_layers_keep_more_experts_of_one_budget() -> None:
    sizes, budget = Sizes(fixed=0, per_expert=1, layers=3), Budget(keep_ratio=0.5)
    plain = McSmoe(scope="global", budget=budget)
    kept = [
        [len(each.representatives) for each in decide(config, alike(), sizes)]
        for config in (plain, plain.model_copy(update={"weigh_layers": "gain"}))
    ]

    assert kept[0] == [3, 3, 3]  # gains that were attached for another method count nothing
    assert kept[1] == sorted(kept[1], reverse=True) and kept[1][0] > 3 and sum(kept[1]) == 9


def test_early_layers_keep_more_neurons_of_one_budget() -> None:
    curve = {width: (1 - width / 16) ** 2 for width in range(1, 17)}
    widths = Widths(neurons=16, fixed=0, per_neuron=1)
    sizes = Sizes(fixed=0, per_expert=16, layers=3, widths=widths)
    plain = Coalesce(divide="predicted", multiple=1, budget=Budget(keep_ratio=0.5))
    found = [
        [each.width or 0 for each in decide(config, alike(curve=curve), sizes)]
        for config in (plain, plain.model_copy(update={"weigh_layers": "gain"}))
    ]

    assert found[0] == [8, 8, 8]
    assert sum(found[1]) == 24 and found[1][0] > found[1][1] > found[1][2]


def test_gains_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """Six sparse layers among seven, mu of 0.7, gamma of 0.5; no other family has any."""
    model = tiny_momentum.model(num_hidden_layers=7, dense_layers=[2], mu=0.7, gamma=0.5)
    model.save_pretrained(tmp_path / "momentum")
    layers = [statistics_of(layer, [1] * 4) for layer in (0, 1, 3, 4, 5, 6)]

    moe = MoeCheckpoint.open(tmp_path / "momentum")
    found = provide({"gain"}, layers, moe, {})
    other = provide(
        {"gain"}, layers[:2], MoeCheckpoint.open(save_tiny(tmp_path / "m", "mixtral")), {}
    )

    expected = [0.5 * (1 - 0.7**n) / 0.3 for n in range(6, 0, -1)]
    assert [each.gain for each in found] == pytest.approx(expected)
    assert [each.gain for each in other] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("method", "fields"),
    [(McSmoe, {}), (McSmoe, {"preset": "paper"}), (Coalesce, {}), (Coalesce, {"divide": "probe"})],
)
def test_what_has_no_layers_to_weigh_is_refused(method: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="weigh_layers=gain"):
        method(weigh_layers="gain", **fields)
