"""Which member of a group the others are aligned to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stages.align.config import AlignConfig
from stages.align.reference import with_references
from stages.group.config import Budget, Reap, Uncurl
from stages.group.decision import from_labels
from stages.group.methods import DECIDE
from stages.group.methods.scores import saliency
from tests.stages.group.observed import partition, random_layer
from tests.tiny import PROPERTY


@PROPERTY
@given(experts=st.integers(2, 8), kept=st.integers(1, 7), seed=st.integers(0, 999))
def test_the_best_member_of_every_group_represents_it(experts: int, kept: int, seed: int) -> None:
    layer = random_layer(experts, seed)
    (decision,) = DECIDE["uncurl"](Uncurl(), [layer], min(kept, experts))
    scores = {"most_frequent": layer.frequency, "highest_saliency": saliency(layer)}

    for choice, score in scores.items():
        (found,) = with_references([decision], [layer], AlignConfig(reference=choice))
        assert partition(found.group) == partition(decision.group)
        assert found.weight == decision.weight
        for representative, members in zip(found.representatives, found.members, strict=True):
            assert score[representative] == max(score[member] for member in members)


def test_the_methods_own_choice_is_the_default() -> None:
    layer = random_layer(5, 0)
    decision = from_labels(0, [4, 4, 2, None, 4], [1.0] * 5)

    assert with_references([decision], [layer], AlignConfig()) == [decision]


def test_pruning_has_nothing_to_choose() -> None:
    layer = random_layer(6, 0)
    (decision,) = DECIDE["reap"](Reap(budget=Budget(experts_per_layer=3)), [layer], 3)

    for choice in ("most_frequent", "highest_saliency"):
        assert with_references([decision], [layer], AlignConfig(reference=choice)) == [decision]
