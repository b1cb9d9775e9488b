"""Replicas on Ray for real: several share the shards, and one that loses a rank is made anew."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest

from cluster.errors import InfrastructureError
from cluster.executor import Job, Replicas, Resources
from cluster.expert_parallel import ExpertGroup
from cluster.ray import RayExecutor
from cluster.replica import Replica, replicas_that_fit
from models.errors import UserError
from stages.calibrate import parallel, stage
from stages.calibrate.stage import Replica as OneProcess
from stages.calibrate.stage import ShardUnit, reduce
from tests.cluster.shards import save_dealt, units_of, write_corpus

SHARDS = 6


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    """Room for two replicas of two ranks."""
    with RayExecutor(workers=4, max_retries=2) as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_corpus(folder)
    save_dealt(folder / "model", "qwen3_moe")
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
    make_rank: Callable[[ExpertGroup], Callable[[Any], Any]], timeout_s: float = 60, **fields: Any
) -> Job[Any, Any]:
    replicas = Replicas[Any, Any](2, make_rank, timeout_s=timeout_s)
    return Job(_unused, stateful=True, replicas=replicas, **fields)


def _unused() -> Callable[[Any], Any]:
    raise AssertionError("a replica has its own way to make workers")


def say_process(group: ExpertGroup) -> Callable[[Sequence[Number]], int | None]:
    """Every rank gives the larger process number of the two; both must have come."""
    return lambda bundle: group.largest(os.getpid())


def say_bundle(group: ExpertGroup) -> Callable[[Sequence[Number]], Any]:
    """The unit of this rank, and how many came with it."""

    def run(bundle: Sequence[Number]) -> Any:
        group.largest(0)
        own = bundle[group.rank : group.rank + 1]
        return (own[0].value, len(bundle)) if own else None

    return run


def refuse(group: ExpertGroup) -> Callable[[Sequence[Number]], int | None]:
    """The last rank refuses the bundle with unit 1, while the first waits for it."""

    def run(bundle: Sequence[Number]) -> int | None:
        if group.rank == 1 and any(unit.value == 1 for unit in bundle):
            raise UserError("number 1 is not welcome", "leave it out")
        return group.largest(0)

    return run


def stop_in_the_middle(
    sent: signal.Signals, rank: int, times: int, folder: Path, group: ExpertGroup
) -> Callable[[Sequence[ShardUnit]], Any]:
    """A rank that sends itself a signal in the first step of the bundle with shard 1, the first
    `times` times."""
    observe, steps = stage.observe_batch, 0

    def deadly(*words: Any) -> None:
        nonlocal steps
        steps += 1
        so_far = len(list(folder.glob("signal-*")))
        if steps == 1 and group.rank == rank and so_far < times:
            (folder / f"signal-{so_far}").touch()
            os.kill(os.getpid(), sent)
        observe(*words)

    worker = parallel.make_rank(group)

    def run(bundle: Sequence[ShardUnit]) -> Any:
        nonlocal steps
        steps = 0
        stage.observe_batch = deadly if any(unit.index == 1 for unit in bundle) else observe
        return worker(bundle)

    return run


def stop_after_the_last_step(
    folder: Path, group: ExpertGroup
) -> Callable[[Sequence[ShardUnit]], Any]:
    """Rank 1 of the first replica stops when nobody waits for it any more."""
    worker = parallel.make_rank(group)

    def run(bundle: Sequence[ShardUnit]) -> Any:
        found = worker(bundle)
        mark = folder / "stopped"
        if group.rank == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return found

    return run


def die_while_loading(folder: Path, group: ExpertGroup) -> Callable[[Any], int | None]:
    """Rank 1 of the first replica dies after it has joined, before it has run anything."""
    mark = folder / "died"
    if group.rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return say_process(group)


@pytest.mark.slow
def test_replicas_stand_side_by_side_and_serve_many_units(executor: RayExecutor) -> None:
    found = dict(executor.imap(job_of(say_process), [Number(i) for i in range(12)]))
    assert sorted(found) == list(range(12))
    assert len(set(found.values())) == 2


@pytest.mark.slow
def test_bundles_are_filled_and_the_last_units_are_spread(executor: RayExecutor) -> None:
    found = dict(executor.imap(job_of(say_bundle), [Number(i) for i in range(7)]))
    assert {index: value for index, (value, _) in found.items()} == {i: i for i in range(7)}
    sizes = sorted(size for _, size in found.values())
    assert sizes in ([1, 2, 2, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2, 2])
    few = dict(executor.imap(job_of(say_bundle), [Number(i) for i in range(2)]))
    assert few == {0: (0, 1), 1: (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_replica_that_loses_a_rank_is_made_anew_and_its_shards_count_once(
    executor: RayExecutor, files: Path, tmp_path: Path, expected: pa.Table, rank: int
) -> None:
    units = units_of(files / "model", files, SHARDS, f"killed-{rank}")
    job = job_of(partial(stop_in_the_middle, signal.SIGKILL, rank, 2, tmp_path))

    done = dict(executor.imap(job, units))

    assert len(list(tmp_path.glob("signal-*"))) == 2
    assert [done[index].name for index in range(SHARDS)] == [unit.name for unit in units]
    assert reduce(units).equals(expected, check_metadata=True)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_alive_but_silent_is_noticed_in_time(
    executor: RayExecutor, files: Path, tmp_path: Path, expected: pa.Table, rank: int
) -> None:
    units = units_of(files / "model", files, SHARDS, f"stopped-{rank}")
    job = job_of(partial(stop_in_the_middle, signal.SIGSTOP, rank, 1, tmp_path), timeout_s=12)
    start = time.monotonic()

    dict(executor.imap(job, units))

    assert len(list(tmp_path.glob("signal-*"))) == 1
    assert reduce(units).equals(expected, check_metadata=True)
    assert time.monotonic() - start > 12


@pytest.mark.fault
@pytest.mark.slow
def test_a_rank_that_stops_when_the_others_have_ended_is_noticed(
    executor: RayExecutor, files: Path, tmp_path: Path, expected: pa.Table
) -> None:
    units = units_of(files / "model", files, SHARDS, "stopped-last")

    done = dict(executor.imap(job_of(partial(stop_after_the_last_step, tmp_path), 12), units))

    assert (tmp_path / "stopped").exists()
    assert sum(each.resumed for each in done.values()) == 2  # the bundle was written before
    assert reduce(units).equals(expected, check_metadata=True)


@pytest.mark.slow
def test_a_rank_may_be_lost_while_it_loads(executor: RayExecutor, tmp_path: Path) -> None:
    units = [Number(i) for i in range(6)]
    found = dict(executor.imap(job_of(partial(die_while_loading, tmp_path)), units))
    assert (tmp_path / "died").exists()
    assert sorted(found) == list(range(6))


@pytest.mark.fault
@pytest.mark.slow
def test_a_shard_that_always_loses_a_rank_ends_the_run_by_name(
    executor: RayExecutor, files: Path, tmp_path: Path
) -> None:
    units = units_of(files / "model", files, SHARDS, "hopeless")
    job = job_of(partial(stop_in_the_middle, signal.SIGKILL, 1, 99, tmp_path))
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
