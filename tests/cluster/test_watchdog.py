"""A process that waits too long ends itself; one that waits often, but not long, does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.watchdog import EXIT_CODE

REPOSITORY = Path(__file__).resolve().parents[2]


def run(body: str) -> subprocess.CompletedProcess[str]:
    code = f"import time; from cluster.watchdog import Watchdog; dog = Watchdog(0.4)\n{body}"
    words = [sys.executable, "-c", code]
    return subprocess.run(
        words, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_wait_that_takes_too_long_ends_the_process() -> None:
    done = run("with dog.waiting(): time.sleep(50)")
    assert done.returncode == EXIT_CODE
    assert "a rank was silent for 0.4 s" in done.stderr


def test_many_short_waits_and_long_work_do_not() -> None:
    done = run(
        "for _ in range(9):\n with dog.waiting(): time.sleep(0.1)\ntime.sleep(1)\nprint('ok')"
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
