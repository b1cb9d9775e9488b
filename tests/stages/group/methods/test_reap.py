"""REAP keeps the experts with the highest mean of gate times output norm."""

from __future__ import annotations

from stages.group.config import Reap
from stages.group.methods.reap import decide, saliency
from tests.tiny import statistics_of


def test_saliency_is_a_mean_over_the_experts_own_tokens() -> None:
    statistics = statistics_of(0, [10, 2, 0])
    statistics.sums["gate_norm"][:] = [5.0, 4.0, 0.0]

    assert saliency(statistics).tolist() == [0.5, 2.0, 0.0]


def test_a_rare_but_strong_expert_stays() -> None:
    statistics = statistics_of(0, [10, 2, 7])
    statistics.sums["gate_norm"][:] = [5.0, 4.0, 14.0]

    (found,) = decide(Reap(), [statistics], 2)

    assert found.representatives == (1, 2)
    assert found.group == (None, 0, 1)
