"""Arrow tables as immutable IPC files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from models.atomic import staged


def write_table(path: Path, table: pa.Table) -> None:
    """Writes one IPC file, atomically."""
    with (
        staged(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def read_table(path: Path) -> pa.Table:
    """Reads one IPC file into memory."""
    with pa.OSFile(str(path), "rb") as source:
        return pa.ipc.open_file(source).read_all()
