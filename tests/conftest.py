"""The order of test files: slow ones first, so that processes that share them end together."""

from __future__ import annotations

from collections import Counter

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of Slurm tests, then by the number of slow tests; as they came where that is equal."""
    slow: Counter[str] = Counter()
    for item in items:
        weight = 1000 if item.get_closest_marker("slurm") else 1
        slow[item.location[0]] += weight if item.get_closest_marker("slow") else 0
    items.sort(key=lambda item: -slow[item.location[0]])
