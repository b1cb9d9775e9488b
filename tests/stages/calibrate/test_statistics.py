"""The statistics table adds up exactly, and comes back from disk as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.arrow import read_table, write_table
from stages.calibrate.merge_tables import add_tables
from stages.calibrate.observer import INTEGERS, SCALARS, VECTORS, Sums, add, empty_sums
from stages.calibrate.statistics import (
    Key,
    domain_sums,
    layers_of,
    metadata_of,
    read_statistics,
    schema,
    to_table,
)
from stages.errors import StatisticsError
from tests.tiny import PROPERTY

META = {"model": "abc", "tokenizer": "def"}
EXPERTS = 3


def random_sums(seed: int, experts: int = EXPERTS) -> Sums:
    generator = np.random.default_rng(seed)
    return {
        name: generator.integers(0, 2**40, values.shape)
        if name in INTEGERS
        else generator.normal(size=values.shape) * 10.0 ** generator.integers(-9, 9)
        for name, values in empty_sums(experts).items()
    }


def assert_same(a: Sums, b: Sums) -> None:
    for name in SCALARS + VECTORS:
        assert a[name].dtype == b[name].dtype, name
        assert np.array_equal(a[name], b[name]), name


@PROPERTY
@given(experts=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_table_round_trips_through_a_file_exactly(
    experts: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = [("text", 0), ("code", 2), ("text", 2), ("code", 0)]
    sums = {key: random_sums(seed + i, experts) for i, key in enumerate(keys)}
    path = tmp_path_factory.mktemp("table") / "s.arrow"

    write_table(path, to_table(sums, experts, META))

    found = domain_sums(read_statistics(path))
    assert list(found) == sorted(keys)
    for key in keys:
        assert_same(found[key], sums[key])


def test_rows_are_sorted_by_domain_layer_and_expert() -> None:
    table = to_table({("b", 1): random_sums(0), ("a", 2): random_sums(1)}, EXPERTS, META)

    rows = list(zip(*(table[n].to_pylist() for n in ("domain", "layer", "expert")), strict=True))

    assert rows == [(d, layer, e) for d, layer in (("a", 2), ("b", 1)) for e in range(EXPERTS)]


def test_provenance_travels_with_the_table(tmp_path: Path) -> None:
    write_table(tmp_path / "s.arrow", to_table({("a", 0): random_sums(0)}, EXPERTS, META))

    found = read_statistics(tmp_path / "s.arrow")

    assert metadata_of(found) == META
    assert found.schema.equals(schema(EXPERTS, META), check_metadata=True)


@PROPERTY
@given(
    owners=st.lists(st.integers(0, 3), min_size=1, max_size=10),
    seed=st.integers(0, 99),
)
def test_any_distribution_over_shards_adds_up_to_the_same_table(
    owners: list[int], seed: int
) -> None:
    keys: list[Key] = [("a", 0), ("a", 1), ("b", 0)]
    shards: dict[int, dict[Key, Sums]] = {}
    whole: dict[Key, Sums] = {}
    for i, owner in enumerate(owners):
        key, part = keys[i % len(keys)], random_sums(seed + i)
        add(shards.setdefault(owner, {}).setdefault(key, empty_sums(EXPERTS)), part)
        add(whole.setdefault(key, empty_sums(EXPERTS)), part)

    found = domain_sums(add_tables(to_table(s, EXPERTS, META) for s in shards.values()))

    assert list(found) == sorted(whole)
    for key, expected in whole.items():
        for name in SCALARS + VECTORS:
            if name in INTEGERS:
                assert np.array_equal(found[key][name], expected[name]), name
            else:
                scale = 1e10  # of the addends: cancellation leaves nothing to be relative to
                np.testing.assert_allclose(
                    found[key][name], expected[name], rtol=1e-12, atol=1e-15 * scale, err_msg=name
                )


def test_counts_beyond_fp64_are_added_as_integers() -> None:
    sums = random_sums(0)
    sums["selected"][:] = 2**53
    other = random_sums(1)
    other["selected"][:] = 1

    total = add_tables(to_table({("a", 0): each}, EXPERTS, META) for each in (sums, other))

    assert domain_sums(total)["a", 0]["selected"].tolist() == [2**53 + 1] * EXPERTS


def test_the_maximum_is_not_added() -> None:
    first, second = random_sums(0), random_sums(1)
    first["max_abs"][:], second["max_abs"][:] = [1, 5, 3], [4, 2, 3]

    total = add_tables(to_table({("a", 0): each}, EXPERTS, META) for each in (first, second))

    assert domain_sums(total)["a", 0]["max_abs"].tolist() == [4, 5, 3]


def test_one_shard_adds_up_to_itself() -> None:
    table = to_table({("a", 0): random_sums(0), ("b", 1): random_sums(1)}, EXPERTS, META)

    total = add_tables([table])

    assert total.equals(table)
    assert total.schema.equals(table.schema, check_metadata=True)


@pytest.mark.parametrize("other", [META | {"model": "xyz"}, {}, META | {"extra": "1"}], ids=str)
def test_shards_of_another_model_or_data_are_refused(other: dict[str, str]) -> None:
    tables = [to_table({("a", 0): random_sums(0)}, EXPERTS, meta) for meta in (META, other)]

    with pytest.raises(StatisticsError, match="disagree on model, tokenizer or data"):
        add_tables(tables)


def test_layers_are_summed_over_domains() -> None:
    first, second, other = random_sums(0), random_sums(1), random_sums(2)
    table = to_table({("b", 1): first, ("a", 1): second, ("a", 0): other}, EXPERTS, META)

    layers = layers_of(table)

    assert [each.layer for each in layers] == [0, 1]
    assert_same(layers[0].sums, other)
    expected = empty_sums(EXPERTS)
    expected["max_abs"][:] = -np.inf  # a maximum of negative test values
    add(expected, second)
    add(expected, first)
    assert_same(layers[1].sums, expected)


def test_frequency_is_the_share_of_selections() -> None:
    sums = random_sums(0)
    sums["selected"][:] = [1, 0, 3]
    (layer,) = layers_of(to_table({("a", 0): sums}, EXPERTS, META))

    assert layer.frequency.tolist() == [0.25, 0.0, 0.75]


def test_a_layer_that_was_never_used_has_frequency_zero() -> None:
    (layer,) = layers_of(to_table({("a", 0): empty_sums(EXPERTS)}, EXPERTS, META))

    assert layer.frequency.tolist() == [0.0, 0.0, 0.0]
    assert layer.tokens == 0


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.arrow").write_bytes(b"nothing")

    for name in ("bad.arrow", "none.arrow"):
        with pytest.raises(StatisticsError, match="cannot read statistics"):
            read_statistics(tmp_path / name)


def test_another_table_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    write_table(tmp_path / "t.arrow", pa.table({"tokens": [1]}))
    assert read_table(tmp_path / "t.arrow").num_rows == 1

    with pytest.raises(StatisticsError, match="lacks selected, gate"):
        read_statistics(tmp_path / "t.arrow")
