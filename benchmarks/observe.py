"""What observing costs, engine by engine, side by side in one run.

All ways of running the same tokens take turns (ABAB..) in one process with the same number of
threads; a ratio is the median over rounds of the ratio within a round, so that what else the
machine does strikes both. Seconds are those of the clock; ratios of processor time are given
beside them, for machines that others use as well. Peak memory is that of a process of its own for
every way. Replicas run as the pipeline runs them: shards through the Ray executor.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.observe_replicas import replicas
from benchmarks.observe_subsample import subsample_seconds
from benchmarks.output import show, wants_quick

BUNDLED = Path(__file__).resolve().parents[1] / "examples" / "bundled" / "model"
LENGTH, BATCH = 256, 8
Work = Callable[[Sequence[Any]], None]
Times = dict[str, list[tuple[float, float]]]  # way -> (clock, processor) seconds of every round


@dataclass(frozen=True)
class Case:
    """`blocks` random blocks of 256 tokens, in batches of 8, on one thread."""

    name: str
    model: Path
    dtype: str
    blocks: int
    rounds: int


@lru_cache(maxsize=1)
def loaded(folder: Path, dtype: str) -> Any:
    """One copy for all ways: two in one process lie in different pages, and differ by 4 percent."""
    from stages.model import load_model

    return load_model(folder, dtype)


def bare(case: Case) -> Work:
    """The model's forward pass and nothing else; without its head, as calibration runs it."""
    import torch

    from stages.model import batch_of, pad_id

    model = loaded(case.model, case.dtype)

    def work(batches: Sequence[Any]) -> None:
        for batch in batches:
            ids, mask = batch_of(batch.rows, pad_id(model), model.device)
            with torch.inference_mode():
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)

    return work


def resident(case: Case) -> Work:
    """The whole model in memory, observed."""
    from stages.calibrate.recorder import Recorder
    from stages.calibrate.resident import observe_batch

    model = loaded(case.model, case.dtype)

    def work(batches: Sequence[Any]) -> None:
        recorder = Recorder(model.config.num_local_experts)
        for batch in batches:
            observe_batch(model, batch, recorder)
        assert recorder.sums

    return work


def streaming(case: Case) -> Work:
    """One decoder layer in memory at a time, observed."""
    from models.streaming.model import open_streamed
    from stages.calibrate import streaming
    from stages.calibrate.recorder import Recorder

    model, folder = open_streamed(case.model, case.dtype), tempfile.mkdtemp()

    def work(batches: Sequence[Any]) -> None:
        recorder = Recorder(model.config.num_local_experts)
        streaming.observe(model, batches, recorder, Path(folder) / "shard.arrow")
        assert recorder.sums

    return work


# Another way of observing needs an entry here and a ratio in `main`.
WAYS: dict[str, Callable[[Case], Work]] = {
    "bare": bare,
    "observed": resident,
    "streaming": streaming,
}


def in_turns(case: Case, ways: Sequence[str]) -> Times:
    """Seconds of every round, after a warm-up of each way."""
    import torch

    torch.set_num_threads(1)
    batches = random_batches(case)
    works = {way: WAYS[way](case) for way in ways}
    for work in works.values():
        work(batches[:1])
    times: Times = {way: [] for way in ways}
    for _ in range(case.rounds):
        for way, work in works.items():
            start = time.perf_counter(), time.process_time()
            work(batches)
            clock, processor = time.perf_counter() - start[0], time.process_time() - start[1]
            times[way].append((clock, processor))
    return times


def peak(case: Case, way: str) -> int:
    """Peak resident bytes of this process after one round."""
    import torch

    from stages.unit import peak_rss

    torch.set_num_threads(1)
    WAYS[way](case)(random_batches(case))
    return peak_rss()


def random_batches(case: Case) -> list[Any]:
    """The same tokens for every way."""
    import torch
    from transformers import AutoConfig

    from stages.corpus.blocks import Block, batches

    vocabulary = AutoConfig.from_pretrained(case.model).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (case.blocks, LENGTH), generator=generator).tolist()
    return list(batches([Block("any", tuple(row)) for row in ids], BATCH))


def apart(work: Callable[..., Any], *words: Any) -> Any:
    """The result of a function that runs in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *words).result()


def save_random(folder: Path, hidden: int, intermediate: int, layers: int) -> Path:
    """A random Mixtral of 8 experts in fp32."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2,
        num_local_experts=8,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def rows_of(case: Case, times: Times, over: str) -> list[dict[str, Any]]:
    """One row per way: tokens per second, and the ratios to `over`."""
    tokens = case.blocks * LENGTH
    return [
        {
            "model": case.name,
            "dtype": case.dtype,
            "way": way,
            "tokens_per_second": tokens / statistics.median(clock for clock, _ in each),
            "over": over,
            "ratio": ratio(times[over], each),
            "processor_ratio": ratio(times[over], each, processor=True),
        }
        for way, each in times.items()
    ]


def ratio(
    reference: Sequence[tuple[float, float]],
    other: Sequence[tuple[float, float]],
    *,
    processor: bool = False,
) -> float:
    """Speed of `other` in units of `reference`: the median of what each round gave."""
    pairs = zip(reference, other, strict=True)
    return statistics.median(r[processor] / o[processor] for r, o in pairs)


def observed(quick: bool, wide: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the bare and the observed forward pass, and the ratio per model and type."""
    rows, cost = [], {}
    for label, model in (("bundled", BUNDLED), ("random, H 512", wide)):
        for dtype in ("float32", "bfloat16"):
            case = Case(label, model, dtype, BATCH, 9 if quick else 41)
            times = apart(in_turns, case, ("bare", "observed"))
            rows += rows_of(case, times, "bare")
            cost[f"{label}, {dtype}"] = ratio(times["bare"], times["observed"])
            cost[f"{label}, {dtype}, processor time"] = rows[-1]["processor_ratio"]
    return rows, cost


def main() -> None:
    """Prints all ways; the last line is JSON."""
    quick = wants_quick(str(__doc__))
    depth = 8 if quick else 32
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, cost = observed(quick, save_random(folder / "wide", 512, 1024, 4))
        # 80 blocks are 20,480 tokens; the recipes in configs/ have shards of 10 to 33 thousand.
        case = Case("bundled", BUNDLED, "float32", 80, 3 if quick else 9)
        times = apart(in_turns, case, ("observed", "streaming"))
        rows += rows_of(case, times, "observed")
        deep = save_random(folder / "deep", 384, 768, depth)
        case = Case(f"random, {depth} layers", deep, "float32", 2 * BATCH, 1)
        peaks = {way: apart(peak, case, way) for way in WAYS}
        deeper = save_random(folder / "deeper", 384, 768, 2 * depth)
        peaks["streaming, twice the layers"] = apart(peak, replace(case, model=deeper), "streaming")
        sampled = 80 * LENGTH
        seconds = apart(subsample_seconds, BUNDLED, folder, sampled)
        once = statistics.median(processor for _, processor in times["observed"])
        shared = replicas(BUNDLED, folder, rounds=1 if quick else 5)
    show(
        "observe",
        rows + shared.rows,
        observed_over_bare=cost["random, H 512, float32"],
        observed_over_bare_by_model=cost,
        streaming_over_resident=ratio(times["observed"], times["streaming"]),
        expert_parallel_counts_equal=shared.counts_equal,
        replicas_2_over_1=shared.two_over_one,
        # Processor time of all experts on some tokens, over that of observing the same tokens.
        subsample_over_observed=seconds / once,
        peak_rss_bytes=peaks | shared.peaks,
    )


if __name__ == "__main__":
    main()
