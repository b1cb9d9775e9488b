"""Units that read the same files run on the node that read them last, where it has a slot free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any


class Homes:
    """Remembers which node last ran a unit with a key (`near` of a unit; None: it has no key)."""

    def __init__(self) -> None:
        self._nodes: dict[str, str] = {}

    def remember(self, unit: Any, node: str, result: Any = None) -> None:
        """The unit has run there, so what it reads lies there; unless it says that it was done
        before (`resumed`), and so read nothing."""
        key = key_of(unit)
        if key is not None and not getattr(result, "resumed", False):
            self._nodes[key] = node

    def settle(self, key: str, node: str) -> None:
        """A node says that it holds this; the first that says so has it."""
        self._nodes.setdefault(key, node)

    def choose(
        self,
        waiting: list[int],
        units: Sequence[Any],
        slots: Mapping[str, int],
        busy: Counter[str | None],
        idle: Collection[str] = (),
    ) -> tuple[int, str | None]:
        """Takes a unit off `waiting` (whose last is the next), and the node to send it to.

        First comes a unit whose home has a slot free, then one that has no home, then any other:
        no slot stays empty because its bytes are elsewhere.

        Args:
            slots: node -> units that fit on it.
            busy: node -> units that were sent to it and run.
            idle: nodes of processes that wait for a unit; where there are any, one of them is used.
        """
        if key_of(units[waiting[-1]]) is None:
            return waiting.pop(), None
        free = {node: slots[node] - busy[node] for node in slots if slots[node] > busy[node]}
        open_to = [node for node in free if node in idle] or list(free)
        if not open_to:
            return waiting.pop(), None
        for place in reversed(range(len(waiting))):
            home = self._home(units[waiting[place]])
            if home in open_to:
                return waiting.pop(place), home
        strangers = (p for p in reversed(range(len(waiting))) if not self._home(units[waiting[p]]))
        place = next(strangers, len(waiting) - 1)
        return waiting.pop(place), max(open_to, key=free.__getitem__)

    def _home(self, unit: Any) -> str | None:
        return self._nodes.get(key_of(unit) or "")


def key_of(unit: Any) -> str | None:
    """What the units that read the same files have in common."""
    found: str | None = getattr(unit, "near", None)
    return found
