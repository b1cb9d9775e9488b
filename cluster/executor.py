"""The small protocol behind which units run in this process, or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from cluster.expert_parallel import ExpertGroup

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Resources:
    """What one unit occupies while it runs. `memory_bytes` 0 means unknown."""

    cpus: int = 1
    gpus: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Replicas(Generic[T, R]):
    """Units that run in bundles: N processes hold one model together and take a unit each.

    `make_rank` is called once in every process of a replica. All ranks are called with the same
    bundle of 1 to N units; rank r runs unit r and returns its result, ranks beyond the end of the
    bundle help the others and return None.
    """

    ranks: int
    make_rank: Callable[[ExpertGroup], Callable[[Sequence[T]], R | None]]
    # STRICT_PACK: all ranks of a replica on one node. PACK: as few nodes as possible.
    placement: Literal["STRICT_PACK", "PACK"] = "STRICT_PACK"
    # Longest silence of a rank that is alive; its replica is then killed and made anew.
    timeout_s: float = 900.0


@dataclass(frozen=True)
class Job(Generic[T, R]):
    """How to run units of one kind.

    A unit may have a `near`: units with the same one read the same file of a node's cache, and
    run, where a slot is free there, on the node that has it.

    `make_worker` is called once per worker and returns the function that runs one unit; what it
    holds (a loaded model) then serves many units. `stateful` says whether that is worth a
    long-lived process. Everything must be picklable.
    """

    make_worker: Callable[[], Callable[[T], R]]
    stateful: bool = False
    resources: Resources = Resources()
    # None: one process per unit. Otherwise `resources` are those of one rank.
    replicas: Replicas[T, R] | None = None


def never() -> bool:
    """Nobody asks to stop."""
    return False


Cause = Literal["lost", "out_of_memory"]


@dataclass(frozen=True)
class Lost:
    """Units whose worker was lost to the infrastructure: `lost` to a kill, a node or a peer,
    `out_of_memory` to the memory monitor."""

    units: Sequence[str]
    cause: Cause
    # How often these units have been lost to this cause, this time included.
    times: int
    # Whether they are run again; False: the budget of the cause is spent.
    retried: bool
    error: str


Heed = Callable[[Lost], None]


def ignore(lost: Lost) -> None:
    """Nobody wants to know."""


class Executor(Protocol):
    """Runs units somewhere and yields results in the order in which they end."""

    def imap(
        self,
        job: Job[T, R],
        units: Sequence[T],
        stop: Callable[[], bool] = never,
        heed: Heed = ignore,
    ) -> Iterator[tuple[int, R]]:
        """Yields (index of the unit, its result); the first failure ends the iteration.

        Once `stop()` is true no unit is started; those in flight end and are yielded. `heed` hears
        of every lost worker, before its units are run again.
        """

    def heed(self, event: Mapping[str, Any]) -> None:
        """Hears every event of the run: where the cluster keeps metrics, it counts them."""

    def check_shared(self, run: Path, inputs: Sequence[Path]) -> None:
        """Makes sure that every node that runs units sees the run folder and the inputs.

        Raises:
            NotShared: names the nodes and what they do not see.
        """

    def locate(self, held: Callable[[], Sequence[str]]) -> None:
        """Asks every node which files it holds; units that are `near` one of them go there first.

        Args:
            held: called on the node; gives the `near` of units that would find their bytes there.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def fix_threads(threads: int) -> None:
    """Pins the number of threads inside a unit: sums then do not depend on the machine's load."""
    import torch

    torch.set_num_threads(threads)
