"""`coalesce logs`"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import RunFolderError
from orchestrator.events import read_events
from orchestrator.run_folder import RunFolder
from orchestrator.unit_log import LogFolder


def logs_command(
    run_dir: Path, unit: str | None, *, stage: str | None, failed: bool, tail: int | None
) -> None:
    """Prints the log files of the units that are asked for, oldest first.

    Raises:
        RunFolderError: no run here, or no unit with such a log.
    """
    folder = RunFolder(run_dir.absolute())
    if not folder.identity.exists():
        raise RunFolderError(f"no run in {folder.root}", "give the run_dir of a started run")
    wanted = set(_failed(folder)) if failed else None
    found = [
        path
        for path in sorted(folder.logs.glob("*/*.log"), key=lambda path: path.stat().st_mtime)
        if (wanted is None or path in wanted)
        and (stage is None or path.parent.name == stage)
        and (unit is None or path in _paths(folder, unit))
    ]
    if not found:
        if failed and unit is None:
            print("no unit of the latest start failed")
            return
        raise RunFolderError(
            f"no log of {unit or 'any unit'} in {folder.logs}{f'/{stage}' if stage else ''}",
            "units are named in `coalesce status --json` and by the files in that folder",
        )
    for path in found:
        _print(path, tail)


def _failed(folder: RunFolder) -> Iterator[Path]:
    """Files of the units that failed or were lost since the latest start."""
    found: list[Path] = []
    for event in read_events(folder.events):
        if event["event"] == "run_started":
            found = []
        elif event["event"] in ("unit_failed", "unit_lost"):
            found.append(_path(folder, event["stage"], event["unit"]))
    yield from found


def _paths(folder: RunFolder, unit: str) -> set[Path]:
    """A unit may be named as in the events, or as its file."""
    stages = [path.name for path in folder.logs.iterdir() if path.is_dir()]
    named = {_path(folder, stage, unit) for stage in stages}
    return named | {folder.logs / stage / f"{unit.removesuffix('.log')}.log" for stage in stages}


def _path(folder: RunFolder, stage: str, unit: str) -> Path:
    return LogFolder.of(folder.logs, stage).path(unit)


def _print(path: Path, tail: int | None) -> None:
    lines = path.read_text(errors="replace").splitlines()
    shown = lines if tail is None else lines[max(len(lines) - tail, 0) :]
    print(f"==> {path} <==")
    print("\n".join(shown))
