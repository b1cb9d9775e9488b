"""Shards: any cut gives the same table, and a retry counts once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.arrow import write_table
from stages.calibrate.config import CalibrateConfig
from stages.calibrate.observer import INTEGERS
from stages.calibrate.stage import (
    Replica,
    ShardUnit,
    make_worker,
    plan,
    reduce,
)
from stages.calibrate.statistics import domain_sums, metadata_of, read_statistics
from stages.corpus.blocks import Block, batches
from stages.corpus.config import CorpusConfig, Source
from tests.tiny import EXPERTS, PROPERTY, TOP_K, random_ids, save_tiny

LENGTHS = {"code": [7, 7, 3], "text": [9, 2, 9, 9, 5]}
BLOCKS = [
    Block(domain, tuple(random_ids(1, length, seed)[0].tolist()))
    for domain, lengths in LENGTHS.items()
    for seed, length in enumerate(lengths)
]
INPUTS = {"model": "abc", "corpus": "def"}


def config(**fields: Any) -> CalibrateConfig:
    return CalibrateConfig(data=CorpusConfig(sources=(Source(path="x"),)), **fields)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a corpus file."""
    folder = tmp_path_factory.mktemp("files")
    columns = {
        "domain": pa.array([b.domain for b in BLOCKS]),
        "tokens": pa.array([b.tokens for b in BLOCKS], pa.list_(pa.int32())),
    }
    write_table(folder / "tokens.arrow", pa.table(columns))
    return save_tiny(folder / "model", "qwen3_moe"), folder / "tokens.arrow"


def units_of(files: tuple[Path, Path], folder: Path, **fields: Any) -> list[ShardUnit]:
    model, corpus = files
    return plan(
        config(**fields),
        blocks=len(BLOCKS),
        corpus=corpus,
        model=model,
        num_experts=EXPERTS,
        folder=folder,
        inputs=INPUTS,
    )


@pytest.fixture(scope="module")
def replica() -> Replica:
    return Replica()


@PROPERTY
@given(blocks=st.integers(1, 60), size=st.integers(1, 9), shards=st.integers(1, 9))
def test_the_plan_covers_every_block_once_in_order(blocks: int, size: int, shards: int) -> None:
    units = plan(
        config(batch_size=size, shards=shards),
        blocks=blocks,
        corpus=Path("c"),
        model=Path("m"),
        num_experts=2,
        folder=Path("f"),
        inputs={},
    )

    assert (units[0].start, units[-1].stop) == (0, blocks)
    assert all(a.stop == b.start for a, b in pairwise(units))
    assert all(unit.start < unit.stop for unit in units)
    assert len(units) <= shards
    assert all(unit.start % size == 0 for unit in units)
    assert len({unit.output for unit in units}) == len(units)


@PROPERTY
@given(domains=st.lists(st.sampled_from("ab"), max_size=20), size=st.integers(1, 5))
def test_batches_hold_consecutive_blocks_of_one_domain(domains: list[str], size: int) -> None:
    blocks = [Block(domain, (i,)) for i, domain in enumerate(domains)]

    found = list(batches(blocks, size))

    assert [block for batch in found for block in batch.blocks] == blocks
    assert [blocks[batch.start] for batch in found] == [batch.blocks[0] for batch in found]
    assert all(1 <= len(batch.blocks) <= size for batch in found)
    assert all(len({block.domain for block in batch.blocks}) == 1 for batch in found)


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_any_number_of_shards_gives_the_same_statistics(
    files: tuple[Path, Path], tmp_path: Path, replica: Replica, shards: int
) -> None:
    whole = units_of(files, tmp_path / "one", shards=1, batch_size=1)
    cut = units_of(files, tmp_path / "many", shards=shards, batch_size=1)
    assert len(cut) == shards
    for unit in [*whole, *reversed(cut)]:
        replica.run_one(unit)

    expected, found = domain_sums(reduce(whole)), domain_sums(reduce(cut))

    assert list(found) == list(expected)
    for key, sums in expected.items():
        for name, values in sums.items():
            if name in INTEGERS or name == "max_abs":
                assert np.array_equal(found[key][name], values), name
            else:
                scale = float(np.abs(values).max())
                np.testing.assert_allclose(found[key][name], values, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("size", [2, 8])
def test_the_batch_size_changes_no_count(
    files: tuple[Path, Path], tmp_path: Path, replica: Replica, size: int
) -> None:
    """Sums of floats agree to the rounding of the model's own fp32 arithmetic."""
    tables = []
    for batch_size in (1, size):
        units = units_of(files, tmp_path / str(batch_size), shards=2, batch_size=batch_size)
        for unit in units:
            replica.run_one(unit)
        tables.append(domain_sums(reduce(units)))

    for key, sums in tables[0].items():
        for name, values in sums.items():
            if name in INTEGERS:
                assert np.array_equal(tables[1][key][name], values), name
            else:
                np.testing.assert_allclose(tables[1][key][name], values, rtol=1e-4, atol=1e-4)


def test_statistics_are_kept_by_domain(
    files: tuple[Path, Path], tmp_path: Path, replica: Replica
) -> None:
    (unit,) = units_of(files, tmp_path, shards=1)

    result = replica.run_one(unit)

    found = domain_sums(read_statistics(unit.output))
    assert list(found) == [("code", 0), ("code", 2), ("text", 0), ("text", 2)]
    for (domain, _), sums in found.items():
        assert sums["tokens"].tolist() == [sum(LENGTHS[domain])] * EXPERTS
        assert sums["selected"].sum() == sum(LENGTHS[domain]) * TOP_K
    tokens = sum(map(sum, LENGTHS.values()))
    assert result == {"tokens": tokens, "blocks": len(BLOCKS), "engine": "resident"}


def test_a_retried_or_repeated_shard_is_counted_once(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    units, work = units_of(files, tmp_path, shards=3, batch_size=2), make_worker()
    for unit in units:
        work(unit)
    expected = reduce(units)

    again = work(units[1])
    units[2].output.unlink()  # lost after it was done
    work(units[2])

    assert again.resumed
    assert reduce(units).equals(expected)


def test_the_table_does_not_depend_on_the_order_in_which_shards_end(
    files: tuple[Path, Path], tmp_path: Path, replica: Replica
) -> None:
    tables = []
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        units = units_of(files, tmp_path / name, shards=3, batch_size=2)
        for index in order:
            replica.run_one(units[index])
        tables.append(reduce(units))

    assert tables[0].equals(tables[1])


def test_shards_carry_their_provenance(
    files: tuple[Path, Path], tmp_path: Path, replica: Replica
) -> None:
    unit = units_of(files, tmp_path, shards=8)[0]
    replica.run_one(unit)

    assert metadata_of(read_statistics(unit.output)) == INPUTS


@pytest.mark.parametrize(
    "fields", [{"dtype": "bfloat16"}, {"batch_size": 4}, {"shards": 1}], ids=str
)
def test_what_changes_the_arithmetic_changes_the_fingerprint(
    files: tuple[Path, Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    base = units_of(files, tmp_path, shards=4, batch_size=2)[0]

    assert units_of(files, tmp_path, **({"shards": 4, "batch_size": 2} | fields))[
        0
    ].fingerprint != (base.fingerprint)


def test_the_model_is_loaded_once_and_in_the_asked_type(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    replica = Replica()
    first, second = units_of(files, tmp_path, shards=2, batch_size=4)
    replica.run_one(first)
    loaded = replica._model(first)

    assert replica._model(second) is loaded
    (half,) = units_of(files, tmp_path, shards=1, dtype="bfloat16")
    assert replica._model(half).dtype == torch.bfloat16
