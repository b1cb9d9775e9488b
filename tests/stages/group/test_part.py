"""Some experts of a layer as a layer, and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.group.decision import from_labels
from stages.group.part import part, with_protected
from tests.stages.group.observed import observed_layer, random_layer, random_tokens
from tests.tiny import PROPERTY


@PROPERTY
@given(data=st.data(), experts=st.integers(2, 7), seed=st.integers(0, 99))
def test_a_part_holds_what_each_of_its_experts_and_pairs_had(
    data: st.DataObject, experts: int, seed: int
) -> None:
    whole = replace(random_layer(experts, seed), protected=(0, experts - 1))
    ids = data.draw(st.permutations(range(experts)))[: data.draw(st.integers(1, experts))]

    found = part(whole, ids, layer=17)

    assert found.layer == 17
    assert found.tokens == whole.tokens
    assert {ids[e] for e in found.protected} == {0, experts - 1} & set(ids)
    assert whole.subsample is not None
    assert found.subsample is not None
    for index, expert in enumerate(ids):
        assert found.sums["gate_norm"][index] == whole.sums["gate_norm"][expert]
        assert np.array_equal(
            found.subsample["mean_output"][index], whole.subsample["mean_output"][expert]
        )
        for other, second in enumerate(ids):
            for name in ("logit_gram", "co_selected"):
                assert found.sums[name][index, other] == whole.sums[name][expert, second]
            swap = found.subsample["swap"][index, other]
            assert swap == whole.subsample["swap"][expert, second]


def test_a_part_is_what_observing_only_these_logits_would_give() -> None:
    logits, outputs = random_tokens(5, 0)
    whole = observed_layer(logits, outputs)
    ids = [3, 0, 4]

    found = part(whole, ids)

    alone = observed_layer(logits[:, ids], outputs[:, ids])
    np.testing.assert_allclose(found.sums["logit_gram"], alone.sums["logit_gram"])
    assert found.router is not None and alone.router is not None
    assert np.array_equal(found.router, alone.router)
    np.testing.assert_allclose(found.weights, alone.weights, atol=1e-9)


def test_the_parts_decision_takes_its_place_in_the_layer() -> None:
    layer = random_layer(6, 0)
    inner = from_labels(0, [0, 0, None, 3], [1.0, 2.0, 3.0, 4.0])  # of the experts 0, 2, 3, 5

    found = with_protected(layer, inner, [0, 2, 3, 5])

    assert found == from_labels(
        0,
        [0, 1, 0, None, 4, 5],
        [1.0, layer.frequency[1], 2.0, 3.0, layer.frequency[4], 4.0],
    )
