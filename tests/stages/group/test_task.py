"""One observation with domains, weighted for a task."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.calibrate.statistics import LayerStatistics, layers_of, to_table
from stages.errors import StatisticsError
from stages.group.budget import Sizes
from stages.group.config import Budget, Frequency, HcSmoe, McSmoe
from stages.group.provide import subsample_sums
from stages.group.stage import decide
from stages.group.task import task_layers
from stages.subsample.read import SubsampleStatistics
from tests.stages.group.observed import random_layer
from tests.tiny import PROPERTY

DOMAINS = ("code", "german", "prose")
SIZES = Sizes(fixed=0, per_expert=1, layers=2)


def observed() -> dict[str, list[LayerStatistics]]:
    return {
        domain: [random_layer(6, 10 * index + layer, layer=layer) for layer in range(2)]
        for index, domain in enumerate(DOMAINS)
    }


LAYERS = observed()
TABLE = to_table(
    {(domain, each.layer): each.sums for domain, layers in LAYERS.items() for each in layers}, 6, {}
)


@PROPERTY
@given(weights=st.lists(st.floats(0, 100), min_size=3, max_size=3), scale=st.floats(0.01, 100))
def test_sums_are_weighted_and_only_the_ratios_matter(weights: list[float], scale: float) -> None:
    if max(weights) < 1e-3:
        weights[0] = 1.0
    task = dict(zip(DOMAINS, weights, strict=True))

    found = task_layers(TABLE, task)
    scaled = task_layers(TABLE, {name: scale * weight for name, weight in task.items()})

    assert [each.layer for each in found] == [0, 1]
    for each, other in zip(found, scaled, strict=True):
        for name, values in each.sums.items():
            if name == "max_abs":
                continue
            parts = [w * LAYERS[d][each.layer].sums[name] for d, w in task.items()]
            np.testing.assert_allclose(values, sum(parts) / max(weights), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(values, other.sums[name], rtol=1e-9, atol=1e-12)


def test_one_domain_is_that_domain_alone() -> None:
    for found, expected in zip(task_layers(TABLE, {"german": 7}), LAYERS["german"], strict=True):
        for name, values in found.sums.items():
            assert np.array_equal(values, expected.sums[name])


def test_without_a_task_nothing_changes() -> None:
    for found, expected in zip(task_layers(TABLE, None), layers_of(TABLE), strict=True):
        for name, values in found.sums.items():
            assert np.array_equal(values, expected.sums[name])
            assert values.dtype == expected.sums[name].dtype


def test_the_largest_activation_is_that_of_domains_that_count() -> None:
    found = task_layers(TABLE, {"code": 1, "prose": 1e-6, "german": 0})

    expected = np.maximum(*(LAYERS[d][0].sums["max_abs"] for d in ("code", "prose")))
    assert np.array_equal(found[0].sums["max_abs"], expected)


def test_a_task_decides_otherwise_than_another() -> None:
    asked = Frequency(budget=Budget(experts_per_layer=3))

    found = {domain: decide(asked, task_layers(TABLE, {domain: 1}), SIZES) for domain in DOMAINS}

    for domain, decisions in found.items():
        for each, layer in zip(decisions, LAYERS[domain], strict=True):
            assert set(each.representatives) == set(np.argsort(-layer.frequency)[:3].tolist())
    assert len({each[0].representatives for each in found.values()}) > 1


def test_tiny_weights_do_not_empty_a_layer() -> None:
    plain, tiny = (
        decide(McSmoe(), task_layers(TABLE, {"code": weight}), SIZES) for weight in (1.0, 1e-12)
    )

    assert plain == tiny


def test_a_domain_that_was_not_observed_is_refused() -> None:
    with pytest.raises(StatisticsError, match=r"task names latin; .* domains code, german, prose"):
        task_layers(TABLE, {"code": 1, "latin": 1})


@pytest.mark.parametrize("task", [{}, {"code": 0}, {"code": -1}, {"code": float("nan")}], ids=str)
def test_a_task_without_weight_is_refused(task: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        McSmoe(task=task)


def test_samples_are_weighted_like_routing() -> None:
    sampled = {domain: layers[0].subsample or {} for domain, layers in LAYERS.items()}
    found = subsample_sums(SubsampleStatistics(0, sampled, {}), {"code": 2, "prose": 1})

    for name, values in found.items():
        expected = sampled["code"][name] + 0.5 * sampled["prose"][name]
        np.testing.assert_allclose(values, expected)


def test_a_task_none_of_whose_tokens_were_sampled_is_refused() -> None:
    layer = LAYERS["code"][0]
    assert layer.subsample is not None
    none = {name: np.zeros_like(values) for name, values in layer.subsample.items()}
    subsample = subsample_sums(SubsampleStatistics(0, {"code": none}, {}), {"code": 1})

    with pytest.raises(StatisticsError, match="no token of the domains that count"):
        decide(HcSmoe(), [LayerStatistics(0, layer.sums, subsample)], SIZES)
