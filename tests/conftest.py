"""The order of test files: slow ones first, so that processes that share them end together."""

from __future__ import annotations

from collections import Counter

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files by how long their slow tests may take; as they came where that is equal."""
    seconds: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("slow"):
            own = item.get_closest_marker("timeout")
            seconds[item.location[0]] += int(own.args[0] if own else config.getini("timeout"))
    items.sort(key=lambda item: -seconds[item.location[0]])
