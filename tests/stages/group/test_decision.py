"""The decision table holds exactly the partition it was made from."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from models.arrow import read_table, write_table
from stages.group.decision import SCHEMA, LayerDecision, from_labels, from_table, to_table
from tests.tiny import PROPERTY


@st.composite
def decisions(draw: st.DrawFn, layer: int = 0) -> LayerDecision:
    """Any partition of 1 to 8 experts, some of them dropped."""
    count = draw(st.integers(1, 8))
    chosen = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))
    labels = [
        expert if expert in chosen else draw(st.sampled_from([*chosen, None]))
        for expert in range(count)
    ]
    weight = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    return from_labels(layer, labels, weight)


@PROPERTY
@given(decision=decisions())
def test_every_kept_expert_is_in_exactly_one_group_with_its_representative(
    decision: LayerDecision,
) -> None:
    members = [expert for group in decision.members for expert in group]

    assert sorted(members) == [e for e, group in enumerate(decision.group) if group is not None]
    for representative, group in zip(decision.representatives, decision.members, strict=True):
        assert representative in group


@PROPERTY
@given(decision=decisions())
def test_groups_are_numbered_without_gaps_by_their_representatives(
    decision: LayerDecision,
) -> None:
    kept = {group for group in decision.group if group is not None}

    assert kept == set(range(len(decision.representatives)))
    assert list(decision.representatives) == sorted(decision.representatives)


@PROPERTY
@given(first=decisions(layer=1), second=decisions(layer=0))
def test_a_table_round_trips(first: LayerDecision, second: LayerDecision) -> None:
    assert from_table(to_table([first, second], {})) == [second, first]


def test_a_table_round_trips_through_a_file(tmp_path: Path) -> None:
    decision = from_labels(3, [0, 0, None, 3], [0.1, 0.2, 0.3, 0.4])
    table = to_table([decision], {"model": "abc"})

    write_table(tmp_path / "decision.arrow", table)

    found = read_table(tmp_path / "decision.arrow")
    assert from_table(found) == [decision]
    assert found.schema.equals(SCHEMA.with_metadata({"model": "abc"}), check_metadata=True)


def test_actions_follow_from_the_groups() -> None:
    decision = from_labels(0, [0, 0, None, 3], [0.25] * 4)

    assert [decision.action(expert) for expert in range(4)] == ["merge", "merge", "drop", "keep"]


def test_rows_name_group_and_representative() -> None:
    rows = to_table([from_labels(2, [1, 1, None], [0.5, 0.3, 0.2])], {}).to_pylist()

    assert [row["group"] for row in rows] == [0, 0, None]
    assert [row["is_representative"] for row in rows] == [False, True, False]
    assert [row["weight"] for row in rows] == [0.5, 0.3, 0.2]
    assert {row["layer"] for row in rows} == {2}


def test_predicted_errors_stand_beside_the_experts_of_layers_that_have_them() -> None:
    known, unknown = from_labels(0, [0, 1], [0.5, 0.5]), from_labels(1, [0, 1], [0.5, 0.5])
    table = to_table([known, unknown], {}, {0: [0.25, 0.5]})
    assert table["predicted_error"].to_pylist() == [0.25, 0.5, None, None]
    assert from_table(table) == [known, unknown]
