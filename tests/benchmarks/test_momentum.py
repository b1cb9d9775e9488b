"""The momentum benchmark trains, attacks and compresses; what it finds is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.momentum_table import draw, tables


@pytest.mark.slow
def test_the_quick_form_measures_everything_it_promises(tmp_path: Path) -> None:
    words = ["--quick", "--steps", "4", "--out", str(tmp_path / "out")]
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
    plain, momentum = found["cells"]
    assert (plain["variant"], momentum["variant"]) == ("smoe", "momentum")
    for cell in (plain, momentum):
        assert list(cell["text"]["validation"]) == ["0", "2.5", "5", "10"]
        assert len({each["words"] for each in cell["text"]["validation"].values()}) == 1
        assert [each["layer"] for each in cell["layers_seen"]] == list(range(6))
        assert all(
            0 < each["load_entropy"] <= 1 < each["load_largest"] for each in cell["layers_seen"]
        )
    page = tables(found)
    assert "| post_ln | 6 | heavy ball | 1 |" in page and page.count("\n|") > 10
    draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
