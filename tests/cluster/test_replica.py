"""Replicas on Ray for real: several share the shards, and one that loses a rank is made anew."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import InfrastructureError
from cluster.executor import Job, Replicas, Resources
from cluster.expert_parallel import ExpertGroup
from cluster.ray import RayExecutor
from cluster.replica import Replica, replicas_that_fit
from models.errors import UserError
from stages.calibrate import parallel
from stages.calibrate.observer import INTEGERS
from stages.calibrate.stage import Replica as OneProcess
from stages.calibrate.stage import ShardUnit, reduce
from stages.calibrate.statistics import domain_sums
from tests.cluster.shards import units_of, write_corpus
from tests.tiny import save_tiny

SHARDS = 4


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    """Room for two replicas of two ranks."""
    with RayExecutor(workers=4, max_retries=2) as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_corpus(folder)
    save_tiny(folder / "model", "qwen3_moe")
    return folder


@pytest.fixture(scope="module")
def expected(files: Path) -> pa.Table:
    """The statistics as one process without Ray observes them."""
    units = units_of(files / "model", files, SHARDS, "alone")
    for unit in units:
        OneProcess().run_one(unit)
    return reduce(units)


@dataclass(frozen=True)
class Number:
    """A unit that needs no files."""

    value: int

    @property
    def name(self) -> str:
        return f"number-{self.value}"


def job_of(
    make_rank: Callable[[ExpertGroup], Callable[[Any], Any]], **fields: Any
) -> Job[Any, Any]:
    return Job(_unused, stateful=True, replicas=Replicas(2, make_rank), **fields)


def _unused() -> Callable[[Any], Any]:
    raise AssertionError("a replica has its own way to make workers")


def say_process(group: ExpertGroup) -> Callable[[Number], int | None]:
    """Rank 0 gives its process number; both ranks must have come."""

    def run(unit: Number) -> int | None:
        found = group.gather(os.getpid())
        return found[0] if found else None

    return run


def refuse(group: ExpertGroup) -> Callable[[Number], int | None]:
    """The last rank refuses unit 1, while the first waits for it."""

    def run(unit: Number) -> int | None:
        if unit.value == 1 and group.rank == 1:
            raise UserError("number 1 is not welcome", "leave it out")
        found = group.gather(unit.value)
        return found[0] if found else None

    return run


def die_in_the_middle(
    rank: int, deaths: int, folder: Path, group: ExpertGroup
) -> Callable[[ShardUnit], Any]:
    """A rank that kills itself in its second batch of shard 1, the first `deaths` times."""
    observe, batches = parallel.observe_batch, 0

    def deadly(*words: Any) -> None:
        nonlocal batches
        batches += 1
        so_far = len(list(folder.glob("death-*")))
        if batches == 2 and group.rank == rank and so_far < deaths:
            (folder / f"death-{so_far}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        observe(*words)

    worker = parallel.make_rank(group)

    def run(unit: ShardUnit) -> Any:
        nonlocal batches
        batches = 0
        parallel.observe_batch = deadly if unit.index == 1 else observe
        return worker(unit)

    return run


def die_while_loading(folder: Path, group: ExpertGroup) -> Callable[[Number], int | None]:
    """Rank 1 of the first replica dies after it has joined, before it has run anything."""
    mark = folder / "died"
    if group.rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return say_process(group)


def assert_same(found: pa.Table, expected: pa.Table) -> None:
    ours, theirs = domain_sums(found), domain_sums(expected)
    assert list(ours) == list(theirs)
    for key, sums in theirs.items():
        for name, values in sums.items():
            if name in INTEGERS:
                assert np.array_equal(ours[key][name], values), name
            else:
                np.testing.assert_allclose(ours[key][name], values, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_replicas_stand_side_by_side_and_serve_many_units(executor: RayExecutor) -> None:
    found = dict(executor.imap(job_of(say_process), [Number(i) for i in range(12)]))
    assert sorted(found) == list(range(12))
    assert len(set(found.values())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_replica_that_loses_a_rank_is_made_anew_and_its_shard_counts_once(
    executor: RayExecutor, files: Path, tmp_path: Path, expected: pa.Table, rank: int
) -> None:
    units = units_of(files / "model", files, SHARDS, f"killed-{rank}")
    job = job_of(partial(die_in_the_middle, rank, 2, tmp_path))

    done = dict(executor.imap(job, units))

    assert len(list(tmp_path.glob("death-*"))) == 2
    assert [done[index].name for index in range(SHARDS)] == [unit.name for unit in units]
    assert_same(reduce(units), expected)


@pytest.mark.slow
def test_a_rank_may_be_lost_while_it_loads(executor: RayExecutor, tmp_path: Path) -> None:
    units = [Number(i) for i in range(6)]
    found = dict(executor.imap(job_of(partial(die_while_loading, tmp_path)), units))
    assert (tmp_path / "died").exists()
    assert sorted(found) == list(range(6))


@pytest.mark.slow
def test_a_shard_that_always_loses_a_rank_ends_the_run_by_name(
    executor: RayExecutor, files: Path, tmp_path: Path
) -> None:
    units = units_of(files / "model", files, SHARDS, "hopeless")
    job = job_of(partial(die_in_the_middle, 1, 99, tmp_path))
    with pytest.raises(InfrastructureError, match="shard-00001 lost its worker 3 times"):
        dict(executor.imap(job, units))


@pytest.mark.slow
def test_a_user_error_of_any_rank_arrives_as_itself(executor: RayExecutor) -> None:
    with pytest.raises(UserError, match="not welcome"):
        dict(executor.imap(job_of(refuse), [Number(i) for i in range(4)]))


@pytest.mark.slow
def test_a_replica_larger_than_the_cluster_is_refused(executor: RayExecutor) -> None:
    job = job_of(say_process, resources=Resources(memory_bytes=1 << 50))
    with pytest.raises(InfrastructureError, match="a replica of 2 ranks"):
        dict(executor.imap(job, [Number(0)]))


@pytest.mark.slow
def test_room_that_others_hold_is_named(executor: RayExecutor) -> None:
    replicas = Replicas[Any, Any](2, say_process)
    with pytest.raises(InfrastructureError, match="CPU 4 free of 6 needed"):
        Replica(replicas, {"num_cpus": 3, "num_gpus": 0}, threads=1, room_seconds=2)


@pytest.mark.parametrize(
    ("placement", "nodes", "replicas"),
    [("STRICT_PACK", [3, 3], 2), ("PACK", [3, 3], 3), ("STRICT_PACK", [1, 1], 0)],
)
def test_replicas_fit_as_their_placement_says(
    placement: Literal["STRICT_PACK", "PACK"], nodes: Sequence[int], replicas: int
) -> None:
    assert replicas_that_fit(nodes, Replicas(2, say_process, placement)) == replicas
