"""What adding up statistics shards costs: seconds, memory and bytes per second.

61 layers of 256 experts, 1,000 shards of one domain: 97 GB of tables. A few different shards are
written and each is read many times under paths of its own (hard links), so that the reads come
from the page cache wherever the few fit into memory: the disk is not what is measured.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import show, wants_quick
from models.arrow import write_table
from stages.calibrate.merge_tables import add_files
from stages.calibrate.observer import INTEGERS, Sums, empty_sums
from stages.calibrate.statistics import to_table
from stages.unit import peak_rss, reset_peak_rss

LAYERS, EXPERTS, DIFFERENT = 61, 256, 4


def random_sums(generator: np.random.Generator) -> Sums:
    """One layer, no two values alike."""
    return {
        name: np.asarray(
            generator.integers(0, 2**20, values.shape)
            if name in INTEGERS
            else generator.normal(size=values.shape)
        )
        for name, values in empty_sums(EXPERTS).items()
    }


def write_shards(folder: Path, count: int, domains: int) -> list[Path]:
    """Paths of `count` shards, `DIFFERENT` of which are files of their own."""
    paths = [folder / f"shard-{index:05d}.arrow" for index in range(count)]
    for index, path in enumerate(paths):
        if index < DIFFERENT:
            generator = np.random.default_rng(index)
            keys = [(f"domain-{d}", layer) for d in range(domains) for layer in range(LAYERS)]
            sums = {key: random_sums(generator) for key in keys}
            write_table(path, to_table(sums, EXPERTS, {"model": "benchmark"}))
        else:
            os.link(paths[index % DIFFERENT], path)
    return paths


def measure(count: int, domains: int) -> dict[str, Any]:
    """One merge, after one that fills the page cache."""
    folder = Path(tempfile.mkdtemp(prefix="merge-shards-"))
    try:
        paths = write_shards(folder, count, domains)
        add_files(paths[:DIFFERENT])
        size = sum(path.stat().st_size for path in paths)
        reset_peak_rss()
        start, worked = time.perf_counter(), time.process_time()
        table = add_files(paths)
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        return {
            "shards": count,
            "domains": domains,
            "shard_bytes": size // count,
            "read_bytes": size,
            "seconds": seconds,
            "cpu_seconds": worked,
            "megabytes_per_second": size / 1e6 / seconds,
            "peak_rss_bytes": peak_rss(),
            "result_bytes": table.nbytes,
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Twice as many shards take twice the time and the same memory."""
    counts = (8, 16) if wants_quick(str(__doc__)) else (100, 1000)
    show("merging statistics shards", [measure(count, 1) for count in counts])


if __name__ == "__main__":
    main()
