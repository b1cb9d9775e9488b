"""`coalesce run` and `coalesce calibrate`"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from rich.console import Console

from models.atomic import reporting_full_disk
from orchestrator import progress
from orchestrator.config import RunConfig
from orchestrator.errors import exit_code
from orchestrator.events import EventLog, Listener
from orchestrator.interrupt import Interrupted
from orchestrator.plan import table
from orchestrator.preflight import Prepared, prepare
from orchestrator.report.story import headline
from orchestrator.run import observe, run
from orchestrator.run_folder import MAIN


def run_command(config: RunConfig, *, quiet: bool) -> None:
    """Plan, run, and where to find the result."""
    shown, prepared = console(), prepare(config)
    folder = supervised(prepared, shown, run, quiet=quiet)
    _print_result(shown, prepared)
    print(f"checkpoint: {prepared.folder.output(MAIN)}")
    print(f"report: {folder / 'index.html'}")


def calibrate_command(config: RunConfig, *, quiet: bool) -> None:
    """Plan, observe, and where the statistics are."""
    path = supervised(prepare(config), console(), observe, quiet=quiet)
    print(f"statistics: {path}")


def console() -> Console:
    """As wide as the terminal, or 140 columns."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def supervised(
    prepared: Prepared,
    shown: Console,
    work: Callable[[Prepared, Sequence[Listener]], Path],
    *,
    quiet: bool,
) -> Path:
    """Shows plan and progress; a failure is written to the events before it is reported."""
    if not quiet:
        shown.print(table(prepared))
    try:
        with reporting_full_disk(prepared.folder.root), ExitStack() as stack:
            listeners = [] if quiet else [stack.enter_context(progress.listener(shown))]
            return work(prepared, listeners)
    except BaseException as error:
        _record_failure(prepared, error)
        raise


def _record_failure(prepared: Prepared, error: BaseException) -> None:
    if prepared.folder.identity.exists():
        message = str(error) or type(error).__name__
        kind = "run_stopped" if isinstance(error, Interrupted) else "run_failed"
        with suppress(OSError):  # on a full disk the error itself matters more
            EventLog(prepared.folder.events).emit(kind, error=message, code=exit_code(error))


def _print_result(console: Console, prepared: Prepared) -> None:
    import json

    report = json.loads((prepared.folder.report / "report.json").read_text())
    console.print(headline(report), highlight=False, markup=False, soft_wrap=True)
