"""The momentum benchmark trains, attacks and compresses; what it finds is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_quick_form_measures_everything_it_promises(tmp_path: Path) -> None:
    words = ["--quick", "--steps", "4", "--threads", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.momentum", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["mu0_bit_equal"] is True and found["compressed_opens"] is True
    for name in ("smoe", "momentum"):
        clean, attacked = found[f"clean_ppl_{name}"], found[f"attacked_ppl_{name}"]
        assert 1 < clean < float("inf") and clean != attacked
    (cell,) = found["cells"]
    assert list(cell["perplexity_per_word"]["momentum"]["validation"]) == ["0", "2.5", "5", "10"]
