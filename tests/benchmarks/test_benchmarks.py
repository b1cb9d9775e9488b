"""Benchmarks run and end with one JSON line of figures (`quality`: in tests/test_readme.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alignment", "merge_shards", "observer", "streaming"])
def test_a_quick_benchmark_ends_with_its_figures_as_json(name: str) -> None:
    words = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert len(rows) >= 2
    assert all(row.keys() == rows[0].keys() for row in rows)
