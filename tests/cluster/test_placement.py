"""Units go to the node that has read their files: the choice itself, and on a real cluster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.executor import Job
from cluster.placement import Homes
from cluster.ray import RayExecutor
from stages.unit import Done


@dataclass(frozen=True)
class Read:
    """A unit that reads the file `near`."""

    number: int
    near: str | None

    @property
    def name(self) -> str:
        return f"read-{self.number}"


def settled(*files: tuple[str, str]) -> Homes:
    homes = Homes()
    for file, node in files:
        homes.remember(Read(0, file), node)
    return homes


def test_a_unit_whose_home_is_free_goes_before_those_that_wait_for_theirs() -> None:
    homes = settled(("a", "one"), ("b", "two"))
    units = [Read(0, "a"), Read(1, "a"), Read(2, "b")]
    waiting, slots = [2, 1], {"one": 1, "two": 1}
    assert homes.choose(waiting, units, slots, Counter(one=1)) == (2, "two")
    assert waiting == [1]


def test_a_slot_does_not_stay_empty_because_the_bytes_are_elsewhere() -> None:
    homes = settled(("a", "one"))
    units = [Read(0, "a"), Read(1, "a")]
    assert homes.choose([1], units, {"one": 1, "two": 1}, Counter(one=1)) == (1, "two")


def test_units_without_a_home_are_spread_and_leave_others_theirs() -> None:
    homes = settled(("a", "one"))
    units = [Read(0, "new"), Read(1, "a")]
    assert homes.choose([1, 0], units, {"one": 2, "two": 2}, Counter(one=1)) == (1, "one")
    assert homes.choose([0], units, {"one": 2, "two": 2}, Counter(one=1)) == (0, "two")


def test_units_that_read_no_file_of_a_cache_are_left_to_ray() -> None:
    waiting = [1, 0]
    found = Homes().choose(waiting, [Read(0, None), Read(1, None)], {"one": 1}, Counter())
    assert (found, waiting) == ((0, None), [1])


def test_a_unit_that_was_done_before_has_read_nothing() -> None:
    homes = settled(("a", "one"))
    homes.remember(Read(0, "a"), "two", Done("a", {}, {}, 0.0, 0, resumed=True))
    homes.settle("a", "three")
    assert homes.choose([0], [Read(0, "a")], {"two": 1, "one": 1}, Counter()) == (0, "one")


@given(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12),
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["one", "two", "gone"])),
    st.integers(0, 3),
)
def test_every_unit_is_taken_once_and_no_node_gets_more_than_it_holds(
    files: list[str], known: dict[str, str], ones: int
) -> None:
    homes, slots = settled(*known.items()), {"one": ones, "two": 3}
    units = [Read(number, file) for number, file in enumerate(files)]
    waiting, taken = list(reversed(range(len(units)))), []
    busy: Counter[str | None] = Counter()
    while waiting:
        unit, node = homes.choose(waiting, units, slots, busy)
        taken.append(unit)
        full = busy["one"] >= ones and busy["two"] >= 3
        assert (node is None) == full
        busy[node] += 1
        assert all(busy[name] <= slots[name] for name in slots)
    assert sorted(taken) == list(range(len(units)))


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    """Two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"node_ip_address": "127.0.0.21"} | node)
    cluster.add_node(node_ip_address="127.0.0.22", **node)
    try:
        with RayExecutor(address=cluster.address) as started:
            yield started
    finally:
        cluster.shutdown()


def make_say_node() -> Callable[[Read], str]:
    import ray

    def run(unit: Read) -> str:
        time.sleep(0.1)
        return str(ray.util.get_node_ip_address())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stateful", [False, True])
def test_a_later_stage_runs_where_the_earlier_one_read(
    executor: RayExecutor, stateful: bool
) -> None:
    units = [Read(number, f"file-{stateful}-{number}") for number in range(12)]
    homes = dict(executor.imap(Job(make_say_node), units))
    for _ in range(2):
        ended = list(executor.imap(Job(make_say_node, stateful=stateful), units))
        for node in ("127.0.0.21", "127.0.0.22"):
            own = [homes[number] == node for number, where in ended if where == node]
            # Only a node that has read all of its own takes over what the other would read.
            assert own == sorted(own, reverse=True)
        homes = dict(ended)


@pytest.mark.slow
def test_a_home_that_is_gone_or_unknown_holds_nothing_up(executor: RayExecutor) -> None:
    units = [Read(number, f"lost-{number}") for number in range(2)]
    for unit in units:
        executor.homes.remember(unit, "f" * 56)
    assert len(set(dict(executor.imap(Job(make_say_node), units)).values())) == 2
