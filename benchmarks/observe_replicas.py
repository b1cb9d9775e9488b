"""The replica part of `benchmarks.observe`: the pipeline's own shards through the Ray executor."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.executor import Executor, Job, Replicas, Resources

LENGTH, BATCH, SHARDS = 256, 8, 8


@dataclass(frozen=True)
class Shared:
    """What several workers gave."""

    rows: list[dict[str, Any]]
    two_over_one: float
    counts_equal: bool
    peaks: dict[str, int]


@dataclass(frozen=True)
class Ran:
    """One pass over all shards."""

    rate: float  # tokens per second once every worker had its model
    peak: int
    table: Any


def replicas(model: Path, folder: Path, rounds: int) -> Shared:
    """One and two replicas of one process in turns, then one replica of two ranks."""
    from cluster.ray import RayExecutor
    from stages.calibrate.parallel import make_rank
    from stages.calibrate.stage import make_worker

    write_tokens(folder / "tokens.arrow", model)
    # On two processors, a worker that asks for both has no other beside it.
    jobs = {
        f"{count} replica(s)": (count, Job(make_worker, stateful=True, resources=Resources(cpus)))
        for count, cpus in ((1, 2), (2, 1))
    }
    ranks = "1 replica of 2 ranks"
    # Two shards at a time, one per rank.
    jobs[ranks] = (2, Job(make_worker, stateful=True, replicas=Replicas(2, make_rank)))
    found: dict[str, list[Ran]] = {name: [] for name in jobs}
    with RayExecutor(workers=2) as executor:
        for number in range(rounds):
            for name, (count, job) in jobs.items():
                output = folder / f"{name}-{number}"
                found[name].append(run(executor, job, count, units_of(model, folder, output)))
    one, two, parallel = found.values()
    rates = {name: statistics.median(each.rate for each in ran) for name, ran in found.items()}
    rows = [
        {
            "model": "bundled",
            "dtype": "float32",
            "way": name,
            "tokens_per_second": rate,
            "over": "1 replica(s)",
            "ratio": rate / rates["1 replica(s)"],
            "processor_ratio": None,
        }
        for name, rate in rates.items()
    ]
    return Shared(
        rows=rows,
        two_over_one=statistics.median(b.rate / a.rate for a, b in zip(one, two, strict=True)),
        counts_equal=all(same_counts(one[0].table, each.table) for each in [*two, *parallel]),
        peaks={"replica": max(each.peak for each in one), "rank_of_2": parallel[0].peak},
    )


def run(executor: Executor, job: Job[Any, Any], workers: int, units: list[Any]) -> Ran:
    """Time runs from the moment at which every worker has finished a shard: models are open."""
    from stages.calibrate.stage import reduce

    ended, done = [], []
    for _, each in executor.imap(job, units):
        ended.append(time.perf_counter())
        done.append(each)
    tokens = sum(unit.stop - unit.start for unit in units) * LENGTH / len(units)
    rate = tokens * (len(units) - workers) / (ended[-1] - ended[workers - 1])
    return Ran(rate, max(each.peak_rss_bytes for each in done), reduce(units))


def same_counts(one: Any, other: Any) -> bool:
    """Whether all integer statistics are equal."""
    from stages.calibrate.observer import INTEGERS
    from stages.calibrate.statistics import domain_sums

    ours, theirs = domain_sums(one), domain_sums(other)
    return list(ours) == list(theirs) and all(
        (ours[key][name] == theirs[key][name]).all() for key in ours for name in INTEGERS
    )


def units_of(model: Path, folder: Path, output: Path) -> list[Any]:
    """Eight shards of two batches."""
    from stages.calibrate.config import CalibrateConfig
    from stages.calibrate.stage import plan
    from stages.corpus.config import CorpusConfig, Source

    source = CorpusConfig(sources=(Source(path="x"),))
    return plan(
        CalibrateConfig(data=source, shards=SHARDS, batch_size=BATCH, dtype="float32"),
        blocks=SHARDS * 2 * BATCH,
        corpus=folder / "tokens.arrow",
        model=model,
        num_experts=_config(model).num_local_experts,
        folder=output,
        inputs={"model": "benchmark"},
    )


def write_tokens(path: Path, model: Path) -> None:
    """Random blocks of one domain."""
    import pyarrow as pa
    import torch

    from models.arrow import write_table

    generator = torch.Generator().manual_seed(0)
    size = (SHARDS * 2 * BATCH, LENGTH)
    ids = torch.randint(_config(model).vocab_size, size, generator=generator).tolist()
    columns = {"domain": ["any"] * len(ids), "tokens": pa.array(ids, pa.list_(pa.int32()))}
    write_table(path, pa.table(columns))


def _config(model: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)
