"""Shard files add up to the same bits as their tables, in the memory of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.arrow import write_table
from stages.calibrate.merge_tables import add_files, add_tables
from stages.calibrate.observer import INTEGERS, SCALARS, VECTORS, Sums, empty_sums
from stages.calibrate.statistics import Key, domain_sums, to_table
from stages.errors import StatisticsError
from stages.unit import peak_rss, reset_peak_rss
from tests.tiny import PROPERTY

META = {"model": "abc"}
SHARDS = st.lists(
    st.sets(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), min_size=1),
    min_size=1,
    max_size=6,
)


def random_sums(seed: int, experts: int) -> Sums:
    generator = np.random.default_rng(seed)
    return {
        name: generator.integers(0, 2**40, values.shape)
        if name in INTEGERS
        else generator.normal(size=values.shape) * 10.0 ** generator.integers(-9, 9)
        for name, values in empty_sums(experts).items()
    }


def write_shards(folder: Path, shards: Sequence[dict[Key, Sums]], experts: int) -> list[Path]:
    paths = [folder / f"{index}.arrow" for index in range(len(shards))]
    for path, sums in zip(paths, shards, strict=True):
        write_table(path, to_table(sums, experts, META))
    return paths


@PROPERTY
@given(keys=SHARDS, experts=st.integers(1, 5))
def test_files_add_up_bit_for_bit_in_their_order(
    keys: list[set[Key]], experts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shards = [
        {key: random_sums(100 * i + j, experts) for j, key in enumerate(sorted(some))}
        for i, some in enumerate(keys)
    ]
    expected: dict[Key, Sums] = {}
    for shard in shards:
        for key, sums in shard.items():
            for name, values in sums.items():
                combine = np.maximum if name == "max_abs" else np.add
                before = expected.setdefault(key, {}).get(name)
                expected[key][name] = values if before is None else combine(before, values)
    paths = write_shards(tmp_path_factory.mktemp("shards"), shards, experts)

    table = add_files(paths)

    assert table.equals(to_table(expected, experts, META), check_metadata=True)
    tables = [pa.ipc.open_file(path).read_all() for path in paths]
    assert add_tables(tables).equals(table, check_metadata=True)
    for key, sums in domain_sums(table).items():
        assert all(np.array_equal(sums[n], expected[key][n]) for n in SCALARS + VECTORS)


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    experts, layers = 96, 40  # 9 MB
    sums = {("a", layer): random_sums(layer, experts) for layer in range(layers)}
    (first,) = write_shards(tmp_path, [sums], experts)
    paths = [first]
    for index in range(1, 40):
        paths.append(tmp_path / f"{index}.arrow")
        os.link(first, paths[-1])
    peaks = []
    for count in (2, 2, 40):
        reset_peak_rss()
        add_files(paths[:count])
        peaks.append(peak_rss())

    assert peaks[2] - peaks[1] < 4 * first.stat().st_size


def test_the_sum_outlives_its_files(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [{("a", 0): random_sums(0, 3)}], 3)
    table = add_files(paths)
    paths[0].write_bytes(bytes(paths[0].stat().st_size))
    assert table.equals(to_table({("a", 0): random_sums(0, 3)}, 3, META))


def test_damaged_and_foreign_shards_are_refused_by_name(tmp_path: Path) -> None:
    (good,) = write_shards(tmp_path, [{("a", 0): random_sums(0, 3)}], 3)
    (tmp_path / "bad.arrow").write_bytes(b"nothing")
    write_table(tmp_path / "other.arrow", pa.table({"tokens": [1]}))
    for name, message in (
        ("bad.arrow", "cannot read statistics from .*bad.arrow"),
        ("none.arrow", "cannot read statistics from .*none.arrow"),
        ("other.arrow", "other.arrow is no statistics table: it lacks selected"),
    ):
        with pytest.raises(StatisticsError, match=message):
            add_files([good, tmp_path / name])
