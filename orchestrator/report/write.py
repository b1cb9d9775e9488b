"""Puts a report on disk: numbers, page and picture."""

import json
import math
from pathlib import Path
from typing import Any

from models.atomic import write_bytes
from orchestrator.report.canvas import png
from orchestrator.report.figures import overview_figure
from orchestrator.report.html import render_html


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write report.json, index.html and overview.png; the page is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_strict(report), indent=2, sort_keys=True, allow_nan=False) + "\n"
    page = folder / "index.html"
    write_bytes(folder / "report.json", text.encode())
    write_bytes(folder / "overview.png", png(overview_figure(report)))
    write_bytes(page, render_html(report).encode())
    return page


def _strict(value: Any) -> Any:
    """JSON has no NaN or infinity: they become text, so that a reader still sees them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
