"""How every benchmark prints: a table for people, one JSON line for programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def wants_quick(description: str) -> bool:
    """Parses the one flag that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="under three minutes on two cores")
    return bool(parser.parse_args().quick)


def show(title: str, rows: Sequence[dict[str, Any]], **figures: Any) -> None:
    """Prints the rows, then `{"benchmark": title, <figures>, "rows": [...]}`."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(json.dumps({"benchmark": title, **figures, "rows": list(rows)}))
