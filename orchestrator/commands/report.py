"""`coalesce report`"""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.errors import RunFolderError
from orchestrator.report.story import headline
from orchestrator.report.write import write_report
from orchestrator.run_folder import RunFolder


def report_command(run_dir: Path) -> None:
    """Renders the page from report.json.

    Raises:
        RunFolderError: the run has not got that far.
    """
    folder = RunFolder(run_dir.absolute())
    source = folder.report / "report.json"
    if not source.exists():
        raise RunFolderError(f"{source} does not exist", f"see `coalesce status {run_dir}`")
    report = json.loads(source.read_text())
    write_report(report, folder.report)
    print(headline(report))
    print(f"report: {folder.report / 'index.html'}")
