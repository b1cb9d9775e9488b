"""`coalesce run`"""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress

from rich.console import Console

from models.atomic import reporting_full_disk
from orchestrator import progress
from orchestrator.config import RunConfig
from orchestrator.errors import exit_code
from orchestrator.events import EventLog
from orchestrator.plan import table
from orchestrator.preflight import Prepared, prepare
from orchestrator.report.story import headline
from orchestrator.run import run
from orchestrator.run_folder import MAIN


def run_command(config: RunConfig, *, quiet: bool) -> None:
    """Plan, run, and where to find the result. Failures are written to the events first."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    prepared = prepare(config)
    if not quiet:
        console.print(table(prepared))
    try:
        with reporting_full_disk(prepared.folder.root), ExitStack() as stack:
            listeners = [] if quiet else [stack.enter_context(progress.listener(console))]
            folder = run(prepared, listeners)
    except BaseException as error:
        _record_failure(prepared, error)
        raise
    _print_result(console, prepared)
    print(f"checkpoint: {prepared.folder.output(MAIN)}")
    print(f"report: {folder / 'index.html'}")


def _record_failure(prepared: Prepared, error: BaseException) -> None:
    if prepared.folder.identity.exists():
        message = str(error) or type(error).__name__
        with suppress(OSError):  # on a full disk the error itself matters more
            EventLog(prepared.folder.events).emit(
                "run_failed", error=message, code=exit_code(error)
            )


def _print_result(console: Console, prepared: Prepared) -> None:
    import json

    report = json.loads((prepared.folder.report / "report.json").read_text())
    console.print(headline(report), highlight=False, markup=False, soft_wrap=True)
