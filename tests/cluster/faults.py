"""What the tests of faults share: a small run as a process of its own, and ways to disturb it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.disturb import command_of, descendants
from orchestrator.events import read_events
from tests.orchestrator.tiny_run import Inputs

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDING = Path(__file__).resolve().parent / "holding"
# Nothing is expected to take so long; a machine may be busy with other things.
PATIENCE = 900.0
# Without calibration samples and evaluation: corpus, calibrate, transform, export.
SHORT = ("evaluate=null", "calibrate.sample.tokens=0")


def environment(holds: Path | None = None, **more: str) -> dict[str, str]:
    """Of a driver or a Ray node; with `holds`, its Python processes can be held."""
    path = f"{HOLDING}{os.pathsep}{REPOSITORY}"
    ours = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    ours |= {"PYTHONPATH": path} | ({"COALESCE_HOLDS": str(holds)} if holds else {})
    return {**os.environ, **ours, **more}


def whole(inputs: Inputs) -> Path:
    """A recipe with every stage, on two Ray workers."""
    text = [{"path": str(inputs.text), "domain": "prose"}]
    return inputs.recipe(
        calibrate__shards=4,
        evaluate={
            "data": {"sources": text, "tokens": 256, "sequence_length": 16},
            "baselines": ["reap"],
            "kl_positions": 32,
        },
        executor={"kind": "ray", "workers": 2},
    )


@dataclass
class Driver:
    """`coalesce run` in a session of its own."""

    inputs: Inputs
    run_dir: Path
    overrides: Sequence[str] = ()
    env: dict[str, str] = field(default_factory=environment)
    before: Sequence[str] = ()  # words that run the command elsewhere

    def __enter__(self) -> Driver:
        words = [sys.executable, "-m", "orchestrator", "run", str(self.inputs.root / "recipe.yaml")]
        place = json.dumps(str(self.run_dir), ensure_ascii=False)
        words += ["--quiet", f"run_dir={place}", *self.overrides]
        self.process = subprocess.Popen(
            [*self.before, *words],
            cwd=REPOSITORY,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what a failed test leaves: the driver, and the Ray that it started."""
        ours = [self.process.pid, *descendants(self.process.pid)]
        if self.process.poll() is None:
            kill(*ours)
        self.process.communicate()

    def end(self) -> tuple[int, str]:
        """Exit code and standard error."""
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err

    def succeed(self) -> None:
        """Waits for a good end."""
        code, err = self.end()
        assert code == 0, err


class Holds:
    """Processes that wait in the midst of a unit; see holding/sitecustomize.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def want(self, name: str, pattern: str, allocate: int = 0) -> None:
        """The next process that opens a temporary file with such a path is to wait there."""
        wish = self.folder / f"{name}.new"
        wish.write_text(f"{pattern}\n{allocate}\n")
        wish.rename(wish.with_suffix(".wanted"))

    def taken(self, name: str, driver: Driver) -> int:
        """The process that waits."""
        held = self.folder / f"{name}.held"
        until(lambda: held.exists() or driver.process.poll() not in (None, 2), f"{name} is held")
        assert held.exists(), driver.end()
        return int(held.read_text())

    def release(self, name: str) -> None:
        """Lets the process go on."""
        (self.folder / f"{name}.held").unlink()


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)


def bytes_of(run_dir: Path) -> dict[str, str]:
    """Digest of everything that a user keeps."""
    kept = [run_dir / "statistics.arrow", run_dir / "decision.arrow"]
    for folder in ("output", "layers", "calibration/inputs", "calibration/subsample"):
        kept += [path for path in run_dir.glob(f"{folder}/*") if path.is_file()]
    kept = [path for path in kept if not path.name.endswith((".safetensors.json", ".arrow.json"))]
    return {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in kept
    }


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind, in their order."""
    return [event for event in read_events(run_dir / "events.jsonl") if event["event"] == kind]


def kill(*processes: int) -> None:
    """SIGKILL to those that are there."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@dataclass
class Node:
    """`ray start --block`: a node of a cluster. `ray stop` would end other people's clusters."""

    address: str  # of the cluster
    host: str
    head: bool = False
    env: dict[str, str] = field(default_factory=environment)
    before: Sequence[str] = ()

    def __enter__(self) -> Node:
        words = [str(Path(sys.prefix) / "bin" / "ray"), "start", "--block", "--num-cpus=1"]
        words += [f"--node-ip-address={self.host}", "--object-store-memory=100000000"]
        if self.head:
            words += ["--head", f"--port={self.address.split(':')[1]}", "--include-dashboard=false"]
        else:
            words += [f"--address={self.address}"]
        self.process = subprocess.Popen(
            [*self.before, *words],
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        ours = descendants(self.process.pid)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        kill(*ours)
        self.process.kill()
        self.process.wait()

    def kill(self, name: str) -> None:
        """SIGKILL to the process of this node with such a program: raylet, gcs_server."""
        found = [p for p in descendants(self.process.pid) if f"/{name} " in f"{command_of(p)} "]
        assert found, f"no {name} among {[*map(command_of, descendants(self.process.pid))]}"
        kill(*found)


def nodes_up(address: str, before: Sequence[str] = ()) -> int:
    """Nodes that are alive, asked by a process of its own; 0 while the cluster does not answer."""
    code = (
        f"import ray; ray.init({address!r}, log_to_driver=False);"
        "print('nodes', sum(node['Alive'] for node in ray.nodes()))"
    )
    words = [*before, sys.executable, "-c", code]
    done = subprocess.run(
        words, env=environment(), capture_output=True, text=True, check=False, timeout=120
    )
    return int(done.stdout.split("nodes ")[-1]) if "nodes " in done.stdout else 0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
