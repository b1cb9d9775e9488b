"""Both engines of calibrate: tokens per second and peak memory, each in processes of its own.

The bundled model shows the cost in time; a deeper random one shows what is saved in memory.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.output import show, wants_quick

BUNDLED = Path(__file__).resolve().parents[1] / "examples" / "bundled" / "model"
LENGTH, BATCH = 256, 8


@dataclass(frozen=True)
class Case:
    """One shard of random tokens: `blocks` of 256, observed in batches of 8."""

    engine: str
    model: Path
    blocks: int
    repeats: int


def measure(case: Case) -> tuple[float, int]:
    """(tokens per second of the fastest repeat after a warm-up, peak resident bytes)."""
    import time

    import torch

    from stages.corpus.blocks import Block, batches
    from stages.unit import peak_rss

    torch.set_num_threads(1)
    work, vocabulary = opened(case)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (case.blocks, LENGTH), generator=generator).tolist()
    blocks = [Block("any", tuple(row)) for row in ids]
    found = list(batches(blocks, BATCH))
    work(found[:1])
    seconds = []
    for _ in range(case.repeats):
        start = time.perf_counter()
        work(found)
        seconds.append(time.perf_counter() - start)
    return case.blocks * LENGTH / min(seconds), peak_rss()


def opened(case: Case) -> tuple[Any, int]:
    """The engine as a function of batches, and the size of the vocabulary."""
    from models.streaming.model import open_streamed
    from stages.calibrate import streaming
    from stages.calibrate.recorder import Recorder
    from stages.calibrate.stage import observe_batch
    from stages.model import load_model

    if case.engine == "streaming":
        streamed = open_streamed(case.model, "float32")
        experts, folder = streamed.config.num_local_experts, tempfile.mkdtemp()

        def work(batches: Any) -> None:
            shard = Path(folder) / "shard.arrow"
            streaming.observe(streamed, batches, Recorder(experts), shard)

        return work, streamed.config.vocab_size
    model = load_model(case.model, "float32")

    def resident(batches: Any) -> None:
        recorder = Recorder(model.config.num_local_experts)
        for batch in batches:
            observe_batch(model, batch, recorder)

    return resident, model.config.vocab_size


def save_deep(folder: Path, layers: int) -> Path:
    """A random Mixtral in fp32, 28 MB a layer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_local_experts": 8}
    MixtralForCausalLM(MixtralConfig(vocab_size=512, **sizes, **heads)).save_pretrained(folder)
    return folder


def compare(name: str, model: Path, blocks: int, rounds: int) -> list[dict[str, Any]]:
    """One row per engine: medians over rounds in which both take turns, in fresh processes."""
    found: dict[str, list[tuple[float, int]]] = {"resident": [], "streaming": []}
    for _ in range(rounds):
        for engine, results in found.items():
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                results.append(pool.submit(measure, Case(engine, model, blocks, 3)).result())
    rates = {engine: statistics.median(r for r, _ in results) for engine, results in found.items()}
    return [
        {
            "model": name,
            "engine": engine,
            "tokens_per_shard": blocks * LENGTH,
            "tokens_per_second": rates[engine],
            "streaming_over_resident": rates[engine] / rates["resident"],
            "peak_rss_bytes": max(peak for _, peak in results),
        }
        for engine, results in found.items()
    ]


def main() -> None:
    """Prints both models, both engines."""
    quick = wants_quick(str(__doc__))
    # 80 blocks are 20,480 tokens; the recipes in configs/ have shards of 10 to 33 thousand.
    blocks, rounds, depth = (80, 1, 8) if quick else (80, 5, 32)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare("bundled, 5 layers", BUNDLED, blocks, rounds)
        deep = save_deep(Path(folder), depth)
        rows += compare(f"random, {depth} layers", deep, 2 * BATCH, 1)
    show("streaming: calibrate", rows)


if __name__ == "__main__":
    main()
