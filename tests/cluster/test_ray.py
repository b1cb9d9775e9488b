"""Ray for real: the same results as in this process, lost workers replaced, user errors at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from cluster.errors import InfrastructureError
from cluster.executor import Executor, Job, Resources
from cluster.local import LocalExecutor
from cluster.ray import RayExecutor
from models.errors import UserError

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Number:
    """A unit that needs no files."""

    value: int
    folder: Path

    @property
    def name(self) -> str:
        return f"number-{self.value}"


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    with RayExecutor(workers=2, max_retries=2) as executor:
        yield executor


def square(unit: Number) -> int:
    return unit.value**2


def make_square() -> Callable[[Number], int]:
    return square


def make_process_id() -> Callable[[Number], int]:
    return lambda unit: os.getpid()


def refuse(unit: Number) -> int:
    if unit.value == 3:
        raise UserError("number 3 is not welcome", "leave it out")
    return unit.value


def make_refuse() -> Callable[[Number], int]:
    return refuse


def die_at_first(deaths: int, unit: Number) -> int:
    """Kills its own process the first `deaths` times that unit 1 is run."""
    mark = unit.folder / "deaths"
    so_far = len(mark.read_text()) if mark.exists() else 0
    if unit.value == 1 and so_far < deaths:
        mark.write_text("x" * (so_far + 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return unit.value


def make_die(deaths: int) -> Callable[[Number], int]:
    return partial(die_at_first, deaths)


def numbers(folder: Path, count: int = 8) -> list[Number]:
    return [Number(value, folder) for value in range(count)]


@pytest.mark.parametrize("stateful", [False, True], ids=["tasks", "actors"])
def test_results_are_those_of_the_local_executor(
    ray_executor: Executor, tmp_path: Path, stateful: bool
) -> None:
    job = Job(make_square, stateful=stateful)
    units = numbers(tmp_path)
    with LocalExecutor(threads=1) as local:
        expected = dict(local.imap(job, units))
    assert dict(ray_executor.imap(job, units)) == expected


def test_actors_are_made_once_and_no_more_than_workers(
    ray_executor: Executor, tmp_path: Path
) -> None:
    job = Job(make_process_id, stateful=True)
    processes = set(dict(ray_executor.imap(job, numbers(tmp_path))).values())
    assert 1 <= len(processes) <= 2
    assert os.getpid() not in processes


@pytest.mark.parametrize("stateful", [False, True], ids=["tasks", "actors"])
def test_a_killed_worker_is_replaced_and_its_unit_is_run_again(
    ray_executor: Executor, tmp_path: Path, stateful: bool
) -> None:
    job = Job(partial(make_die, 2), stateful=stateful)
    assert dict(ray_executor.imap(job, numbers(tmp_path))) == {i: i for i in range(8)}
    assert (tmp_path / "deaths").read_text() == "xx"


@pytest.mark.parametrize("stateful", [False, True], ids=["tasks", "actors"])
def test_a_unit_that_always_kills_its_worker_ends_the_run_by_name(
    ray_executor: Executor, tmp_path: Path, stateful: bool
) -> None:
    job = Job(partial(make_die, 99), stateful=stateful)
    with pytest.raises(InfrastructureError, match="number-1 lost its worker 3 times"):
        dict(ray_executor.imap(job, numbers(tmp_path)))


@pytest.mark.parametrize("stateful", [False, True], ids=["tasks", "actors"])
def test_a_user_error_arrives_as_itself_and_is_not_retried(
    ray_executor: Executor, tmp_path: Path, stateful: bool
) -> None:
    with pytest.raises(UserError, match="not welcome") as caught:
        dict(ray_executor.imap(Job(make_refuse, stateful=stateful), numbers(tmp_path)))
    assert caught.value.remedy == "leave it out"


def test_a_worker_that_fits_no_node_is_refused_instead_of_waiting_for_ever(
    ray_executor: Executor, tmp_path: Path
) -> None:
    job = Job(make_square, stateful=True, resources=Resources(memory_bytes=1 << 50))
    with pytest.raises(InfrastructureError, match="no node can hold one worker"):
        dict(ray_executor.imap(job, numbers(tmp_path)))


def test_no_more_workers_than_the_memory_of_the_nodes_holds(
    ray_executor: Executor, tmp_path: Path
) -> None:
    import ray

    whole = int(ray.cluster_resources()["memory"])
    job = Job(make_process_id, stateful=True, resources=Resources(memory_bytes=whole * 2 // 3))
    assert len(set(dict(ray_executor.imap(job, numbers(tmp_path))).values())) == 1
