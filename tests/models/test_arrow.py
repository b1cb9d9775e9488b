"""Arrow tables come back as they were written."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest

from models.arrow import read_table, write_table


def test_a_table_round_trips_with_types_and_metadata(tmp_path: Path) -> None:
    schema = pa.schema(
        [("name", pa.string()), ("count", pa.int64()), ("pair", pa.list_(pa.float64(), 2))],
        metadata={"model": "abc"},
    )
    rows = {
        "name": ["a", "b"],
        "count": [2**62 + 1, -1],
        "pair": [[0.1, math.nextafter(1.0, 2.0)], [5e-324, 1.7e308]],
    }
    table = pa.table(rows, schema=schema)

    write_table(tmp_path / "t.arrow", table)

    found = read_table(tmp_path / "t.arrow")
    assert found.schema.equals(schema, check_metadata=True)
    assert found.equals(table)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.arrow").write_bytes(b"ARROW1 but nothing else")

    with pytest.raises(pa.ArrowInvalid):
        read_table(tmp_path / "t.arrow")
