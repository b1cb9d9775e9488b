"""Benchmarks run and end with one JSON line of figures (`quality`: in tests/test_readme.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FIGURES = {
    "observe": (
        "observed_over_bare",
        "streaming_over_resident",
        "expert_parallel_counts_equal",
        "replicas_2_over_1",
        "peak_rss_bytes",
    ),
    "compress": (
        "bytes_over_arithmetic",
        "expert_memory_saved",
        "flops_over_original",
        "prefill_over_merged",
        "decode_over_merged",
        "perplexity_over_original_no_recovery",
        "perplexity_over_original_recovered",
    ),
}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alignment", "merge_shards", "observe", "compress"])
def test_a_quick_benchmark_ends_with_its_figures_as_json(name: str) -> None:
    words = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = found["rows"]
    assert len(rows) >= 2
    assert all(row.keys() == rows[0].keys() for row in rows)
    for figure in FIGURES.get(name, ()):
        assert figure in found
    if name == "observe":
        assert found["expert_parallel_counts_equal"] is True
        assert {"bare", "observed", "streaming"} <= set(found["peak_rss_bytes"])
