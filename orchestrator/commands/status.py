"""`coalesce status`"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from orchestrator.status import as_json, details, of, table, warnings


def status_command(run_dir: Path, console: Console, *, json_form: bool) -> None:
    """Prints the table, failed and slowest units and warnings; or all of it as JSON."""
    folder = of(run_dir)
    if json_form:
        print(json.dumps(as_json(folder), indent=2))
        return
    console.print(table(folder))
    for line in [*details(folder), *(f"warning: {message}" for message in warnings(folder))]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
