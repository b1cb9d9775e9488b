"""Injects real faults at random moments of a small run until enough were, and compares bytes.

    python -m benchmarks.soak --faults 50 [--seed S] [--quick]

Every round starts the run in a folder of its own, disturbs it again and again, starts it anew
whenever it ended early, and at last compares the digest of every file of `output/` with those of a
run that nobody disturbed. Ends with exit code 1 as soon as they differ or a start fails in a way
that the fault does not explain. The last line is JSON: faults, runs, starts, identical, by_kind.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.disturb import AT_REST, KINDS, LIVE, Fault, descendants, digests, end_all

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = (
    "calibrate.data.tokens=10240",
    "calibrate.batch_size=4",
    "calibrate.sample.tokens=512",
    "executor.workers=2",
)
WITHOUT_EVALUATION = ("evaluate=null",)
WITH_EVALUATION = ("evaluate.data.tokens=5120", "evaluate.baselines=[]", "evaluate.kl_positions=64")
START_SECONDS = 600
STARTS_PER_ROUND = 60


class Failed(AssertionError):
    """A start ended in a way that no injected fault explains, or bytes differ."""


@dataclass
class Soak:
    """What was done so far."""

    folder: Path
    wanted: int
    overrides: tuple[str, ...]
    chance: random.Random
    injected: list[Fault] = field(default_factory=list)
    runs: int = 0
    starts: int = 0
    # How long an undisturbed run takes: the faults of one round are spread over it.
    seconds: float = 60.0

    def start(self, run_dir: Path) -> subprocess.Popen[str]:
        """The run, or whatever of it is not done yet."""
        words = ["run", "quickstart", "--quiet", f"run_dir={run_dir}", *self.overrides]
        self.starts += 1
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *words],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def undisturbed(self) -> dict[str, str]:
        """Digests of the reference run, which is also timed."""
        begun, run_dir = time.monotonic(), self.folder / "reference" / "run"
        process = self.start(run_dir)
        _, err = process.communicate(timeout=START_SECONDS)
        if process.returncode:
            raise Failed(f"the undisturbed run ended with {process.returncode}: {err}")
        self.seconds = time.monotonic() - begun
        return digests(run_dir)

    def round(self) -> dict[str, str]:
        """One run from its start to its end; digests of what it made."""
        self.runs += 1
        run_dir = self.folder / f"round-{self.runs}" / "run"
        for _ in range(STARTS_PER_ROUND):
            disturbed = self.one_start(run_dir)
            if not disturbed:
                return digests(run_dir)
        raise Failed(f"not finished after {STARTS_PER_ROUND} starts: {run_dir}")

    def one_start(self, run_dir: Path) -> bool:
        """True: it is to be started again, since it ended early or its files were damaged after."""
        process = self.start(run_dir)
        faults: list[Fault] = []
        try:
            while len(self.injected) < self.wanted:
                # Early and late moments alike: starting up takes a good part of the time.
                if _ended_within(process, self.chance.uniform(0.02, 0.4) * self.seconds):
                    break
                faults += self.inject(process.pid, run_dir, LIVE)
            _, err = process.communicate(timeout=START_SECONDS)
        finally:
            end_all([*descendants(process.pid), process.pid] if process.poll() is None else [])
        expected = {code for fault in faults for code in fault.explains}
        if process.returncode and process.returncode not in expected:
            raise Failed(f"exit code {process.returncode} after {faults}: {err}")
        # What units have read is damaged between two starts only: nothing can notice it earlier.
        damaged = self.chance.random() < 0.7 and self.inject(0, run_dir, AT_REST)
        return bool(process.returncode or damaged)

    def inject(self, driver: int, run_dir: Path, kinds: Collection[str]) -> list[Fault]:
        """One fault of a random kind, or of the next one that is possible at this moment."""
        if len(self.injected) >= self.wanted:
            return []
        for kind in self.chance.sample(sorted(kinds), len(kinds)):
            processes = descendants(driver) if driver else []
            fault = KINDS[kind](self.chance, driver, processes, run_dir)
            if fault is not None:
                self.injected.append(fault)
                print(f"{len(self.injected):4d} {fault.kind}: {fault.what}", file=sys.stderr)
                if fault.ends_driver:
                    end_all(processes)
                return [fault]
        return []


def _ended_within(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def soak(folder: Path, faults: int, seed: int, *, quick: bool) -> dict[str, object]:
    """Runs rounds until so many faults were injected; the figures."""
    overrides = (*SMALL, *(WITHOUT_EVALUATION if quick else WITH_EVALUATION))
    state = Soak(folder, faults, overrides, random.Random(seed))
    expected = state.undisturbed()
    while len(state.injected) < faults:
        if (found := state.round()) != expected:
            names = sorted(set(found.items()) ^ set(expected.items()))
            raise Failed(f"round {state.runs} of seed {seed} differs: {names}")
    return {
        "faults": len(state.injected),
        "runs": state.runs,
        "starts": state.starts,
        "identical": True,
        "seed": seed,
        "by_kind": dict(sorted(Counter(fault.kind for fault in state.injected).items())),
    }


def main() -> None:
    """Parses the flags, soaks in a folder that is removed, prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=50, help="how many to inject")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--quick", action="store_true", help="without evaluation")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        try:
            figures = soak(Path(folder), given.faults, given.seed, quick=given.quick)
        except Failed as failure:
            print(json.dumps({"benchmark": "soak", "identical": False, "why": str(failure)}))
            sys.exit(1)
    print(json.dumps({"benchmark": "soak", **figures}))


if __name__ == "__main__":
    main()
