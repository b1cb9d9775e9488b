"""The faults of the soak: each takes a driver, its processes and a run folder, and does harm.

A fault that is not possible at the moment (no worker yet, no finished file) returns None.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Titles of Ray's own agents begin otherwise; without one of those a node ends itself.
_WORKER = ("ray::_", "ray::IDLE")


@dataclass(frozen=True)
class Fault:
    """What was done, and with which exit codes the driver may end because of it."""

    kind: str
    what: str
    explains: tuple[int, ...] = ()
    ends_driver: bool = False


Injector = Callable[[random.Random, int, Sequence[int], Path], Fault | None]


def kill_driver(
    chance: random.Random, driver: int, processes: Sequence[int], run_dir: Path
) -> Fault | None:
    """SIGKILL. Ray's processes notice by themselves that their driver is gone."""
    os.kill(driver, signal.SIGKILL)
    return Fault("SIGKILL driver", str(driver), (-signal.SIGKILL,), ends_driver=True)


def terminate_driver(
    chance: random.Random, driver: int, processes: Sequence[int], run_dir: Path
) -> Fault | None:
    """SIGTERM, as a batch system sends it: 143, or killed where it was not yet listening."""
    os.kill(driver, signal.SIGTERM)
    return Fault("SIGTERM driver", str(driver), (143, -signal.SIGTERM), ends_driver=True)


def kill_worker(
    chance: random.Random, driver: int, processes: Sequence[int], run_dir: Path
) -> Fault | None:
    """SIGKILL to a Ray worker, busy or idle."""
    found = workers(processes)
    if not found:
        return None
    worker = chance.choice(found)
    what = command_of(worker)
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    # One unit may lose its worker by chance more often than the budget allows: exit 75.
    return Fault("SIGKILL worker", what, (75,))


def stop_worker(
    chance: random.Random, driver: int, processes: Sequence[int], run_dir: Path
) -> Fault | None:
    """SIGSTOP, and SIGCONT a while later: a process that was swapped out, or a node that hung."""
    found = workers(processes)
    if not found:
        return None
    worker, seconds = chance.choice(found), chance.uniform(0.1, 3.0)
    what = f"{command_of(worker)} for {seconds:.1f} s"
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(worker, signal.SIGCONT)
    return Fault("SIGSTOP worker", what, (75,))


def delete_file(
    chance: random.Random, driver: int, processes: Sequence[int], run_dir: Path
) -> Fault | None:
    """Removes a file of the finished checkpoint."""
    path = _choice(chance, [p for p in run_dir.glob("output/*") if p.is_file()])
    if path is None:
        return None
    path.unlink(missing_ok=True)
    return Fault("delete output file", path.name)


def flip_byte(
    chance: random.Random, driver: int, processes: Sequence[int], run_dir: Path
) -> Fault | None:
    """Changes one byte of what a unit wrote."""
    found = [
        path
        for path in run_dir.rglob("*")
        if path.suffix in (".arrow", ".safetensors") and not path.name.startswith(".")
    ]
    path = _choice(chance, [path for path in found if path.stat().st_size])
    if path is None:
        return None
    with suppress(FileNotFoundError), path.open("r+b") as file:
        place = chance.randrange(path.stat().st_size)
        file.seek(place)
        old = file.read(1)
        file.seek(place)
        file.write(bytes([old[0] ^ (1 << chance.randrange(8))]))
    return Fault("flip byte", str(path.relative_to(run_dir)))


def truncate_events(
    chance: random.Random, driver: int, processes: Sequence[int], run_dir: Path
) -> Fault | None:
    """Cuts the log of events off, in the midst of a line as a rule."""
    path = run_dir / "events.jsonl"
    if not path.exists() or not path.stat().st_size:
        return None
    size = chance.randrange(path.stat().st_size)
    os.truncate(path, size)
    return Fault("truncate events.jsonl", f"to {size} bytes")


LIVE: dict[str, Injector] = {
    "kill_driver": kill_driver,
    "terminate_driver": terminate_driver,
    "kill_worker": kill_worker,
    "stop_worker": stop_worker,
    "truncate_events": truncate_events,
}
AT_REST: dict[str, Injector] = {
    "delete_file": delete_file,
    "flip_byte": flip_byte,
    "truncate_events": truncate_events,
}
KINDS = LIVE | AT_REST


def digests(run_dir: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of the checkpoint."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (run_dir / "output").iterdir()
    }


def workers(processes: Sequence[int]) -> list[int]:
    """Those that run units, or could."""
    return [process for process in processes if command_of(process).startswith(_WORKER)]


def command_of(process: int) -> str:
    """What `ps` shows; empty once it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
    return ""


def descendants(process: int) -> list[int]:
    """Children, and theirs."""
    found = []
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def end_all(processes: Sequence[int]) -> None:
    """Waits a little for processes that are about to end, then kills what is left of them."""
    deadline = time.monotonic() + 20
    known = {process: command_of(process) for process in processes}
    while time.monotonic() < deadline and any(map(command_of, known)):
        time.sleep(0.1)
    for process, command in known.items():
        # A number may have been given to another process; a worker's title changes with its work.
        if command and command_of(process)[:5] == command[:5]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _choice(chance: random.Random, paths: Sequence[Path]) -> Path | None:
    return chance.choice(sorted(paths)) if paths else None
