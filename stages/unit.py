"""A unit of work, and the one function that runs one: done already? run, digest, mark.

A unit's marker is written last. Its existence, with the right fingerprint and the right digests of
the unit's files, is the only thing that means "done".
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from models.atomic import file_digest, text_digest, write_json
from stages.errors import StaleUnit

Fingerprint = dict[str, Any]


class Unit(Protocol):
    """What every stage's unit offers; units are frozen dataclasses and can be pickled."""

    @property
    def name(self) -> str:
        """For people: `calibrate/shard-00003`."""

    @property
    def outputs(self) -> Sequence[Path]:
        """Files that the unit writes; their names are unique within the unit."""

    @property
    def marker(self) -> Path:
        """The file that says the unit is done."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Everything the result depends on, by part: model, data, config, code, upstream."""


class OneFile:
    """Base of units that write one file, `output`; the marker lies beside it."""

    output: Path

    @property
    def outputs(self) -> Sequence[Path]:
        """The file."""
        return (self.output,)

    @property
    def marker(self) -> Path:
        """Beside the file."""
        return beside(self.output)


U = TypeVar("U", bound=Unit)


@dataclass(frozen=True)
class Done:
    """The outcome of one unit, as it stands in its marker."""

    name: str
    result: dict[str, Any]
    digests: dict[str, str]
    seconds: float
    peak_rss_bytes: int
    resumed: bool = field(default=False, compare=False)


def beside(output: Path) -> Path:
    """The marker of a unit with one output: `X.json` for `X`."""
    return output.with_name(output.name + ".json")


def read_marker(unit: Unit) -> Done | None:
    """The marker of a unit, or None when it is not finished or its files are incomplete.

    Digests are not compared here: that reads every byte, and is done by `execute`.

    Raises:
        StaleUnit: it was finished from another model, data or config.
    """
    try:
        marker = json.loads(unit.marker.read_text())
        found, files = marker["fingerprint"], marker["outputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found != (wanted := _as_json(unit.fingerprint)):
        raise StaleUnit(
            f"{unit.name} was finished under other inputs: {differences(found, wanted)}",
            "choose another `run_dir`, or restore the inputs; delete the run folder to start over",
        )
    sizes = {path.name: path.stat().st_size for path in unit.outputs if path.exists()}
    if sizes != {name: entry["bytes"] for name, entry in files.items()}:
        return None
    digests = {name: entry["sha256"] for name, entry in files.items()}
    seconds, peak = marker["seconds"], marker["peak_rss_bytes"]
    return Done(unit.name, marker["result"], digests, seconds, peak, resumed=True)


def finished(unit: Unit) -> Done | None:
    """The outcome of a unit that is done with intact files; reads every byte of them."""
    done = read_marker(unit)
    return done if done is not None and _intact(unit, done) else None


def execute(unit: U, run_one: Callable[[U], dict[str, Any]]) -> Done:
    """Runs a unit unless it is already done with intact files; marks it when it is."""
    if (found := finished(unit)) is not None:
        return found
    with suppress(OSError):
        unit.marker.unlink()
    reset_peak_rss()
    start = time.monotonic()
    result = run_one(unit)
    digests = {path.name: file_digest(path) for path in unit.outputs}
    done = Done(unit.name, result, digests, round(time.monotonic() - start, 3), peak_rss())
    _write_marker(unit, done)
    return done


def differences(found: Any, wanted: Any, path: str = "") -> str:
    """`config.budget was 8, is 6; ...` for two nested fingerprints."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(set(found) | set(wanted))
        nested = (
            differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
            for key in keys
            if found.get(key) != wanted.get(key)
        )
        return "; ".join(nested)
    return f"{path} was {_short(found)}, is {_short(wanted)}"


def reset_peak_rss() -> None:
    """Starts a new peak, so that a unit in a reused process reports its own."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Highest resident memory of this process in bytes, since the last reset where that works."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10
    scale = 1 if os.uname().sysname == "Darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _intact(unit: Unit, done: Done) -> bool:
    """safetensors loads flipped bits and zeroed tails without a word; digests do not."""
    return all(file_digest(path) == done.digests[path.name] for path in unit.outputs)


def _write_marker(unit: Unit, done: Done) -> None:
    outputs = {
        path.name: {"bytes": path.stat().st_size, "sha256": done.digests[path.name]}
        for path in unit.outputs
    }
    write_json(
        unit.marker,
        {
            "unit": done.name,
            "fingerprint": _as_json(unit.fingerprint),
            "outputs": outputs,
            "result": done.result,
            "seconds": done.seconds,
            "peak_rss_bytes": done.peak_rss_bytes,
        },
    )


def _as_json(value: Fingerprint) -> Any:
    return json.loads(json.dumps(value, sort_keys=True))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 48 else text[:45] + "..."


def read_digests(marker: Path) -> str:
    """One digest for the files of a finished unit, for the fingerprints of units that read them."""
    outputs = json.loads(marker.read_text())["outputs"]
    return text_digest({name: entry["sha256"] for name, entry in outputs.items()})
