"""What a run would do, before anything is spent: units, bytes, memory, what is already done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from orchestrator import pipeline
from orchestrator.preflight import Prepared, disk_bytes, expected_layouts
from orchestrator.run_folder import MAIN
from stages.export.layout import FileLayout
from stages.transform.stage import file_name
from stages.unit import Unit, beside, read_marker
from stages.verify import stage as verify


@dataclass(frozen=True)
class Row:
    """One stage of the plan. Bytes and memory are upper bounds from headers."""

    stage: str
    units: int
    done: int
    read_bytes: int
    written_bytes: int
    peak_bytes: int


def rows(run: Prepared) -> list[Row]:
    """One row per stage, in order."""
    return [_verify(run), _corpus(run), _calibrate(run), *_models(run), *_evaluate(run)]


def table(run: Prepared) -> Table:
    """The rows for a terminal, and the sizes that they lead to."""
    shown = Table(title=f"Plan for {run.folder.root}", caption=summary(run), caption_justify="left")
    for name in ("stage", "units", "done", "reads", "writes", "peak memory / worker"):
        shown.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows(run):
        sizes = (row.read_bytes, row.written_bytes, row.peak_bytes)
        shown.add_row(row.stage, str(row.units), str(row.done), *(human(n) for n in sizes))
    return shown


def summary(run: Prepared) -> str:
    """Sizes before and after, and what is needed on disk."""
    layouts = expected_layouts(run.variants[0], run.moe)
    before, after = run.moe.checkpoint.file_bytes, sum(each.file_bytes for each in layouts)
    return (
        f"{run.moe.family.model_type}, {len(run.moe.layers)} MoE layers of {run.moe.num_experts}"
        f" experts, top-{run.moe.top_k}: {human(before)} -> {human(after)}"
        f" ({after / before:.1%}), exactly {after:,} bytes of weights; {human(disk_bytes(run))} of"
        " disk at the peak"
    )


def human(count: float) -> str:
    """`1.4 GB`; decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _verify(run: Prepared) -> Row:
    checkpoint = run.moe.checkpoint
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    if run.config.model.verify == "headers":
        return Row("verify", 0, 0, 0, 0, 0)
    units = verify.plan(checkpoint, run.folder.verify)
    return Row("verify", len(units), _done(units), checkpoint.file_bytes, 0, 2 * largest)


def _corpus(run: Prepared) -> Row:
    units = pipeline.corpus_units(run)
    tokens = sum(unit.config.tokens for unit in units)
    return Row("corpus", len(units), _done(units), 0, 4 * tokens, 64 * tokens)


def _calibrate(run: Prepared) -> Row:
    config, moe = run.config.calibrate, run.moe
    shards = 0 if config.statistics is not None else config.shards
    finished = len(list(run.folder.shards.glob("*.arrow.json")))
    # int64 and float64 columns: eight scalars and three vectors of E for every expert.
    row_bytes = 8 * (8 + 3 * moe.num_experts) * moe.num_experts * len(moe.layers)
    domains = len(config.data.sources)
    written = row_bytes * (shards + domains)
    peak = moe.checkpoint.nbytes + domains * row_bytes
    return Row("calibrate", shards, min(finished, shards), moe.checkpoint.nbytes, written, peak)


def _models(run: Prepared) -> list[Row]:
    files, done, written, exported = 0, 0, 0, 0
    for variant in run.variants:
        layouts = expected_layouts(variant, run.moe)
        folder = run.folder.layers(variant.name)
        files += len(layouts)
        done += sum(beside(folder / file_name(each.layer)).exists() for each in layouts)
        written += sum(each.file_bytes for each in layouts)
        exported += beside(run.folder.output(variant.name)).exists()
    variants, read = len(run.variants), run.moe.checkpoint.file_bytes * len(run.variants)
    main = expected_layouts(run.variants[0], run.moe)
    return [
        Row("transform", files, done, read, written, _layer_peak(run, main)),
        # Layer files become the output by hard links: nothing is written twice.
        Row("export", variants, exported, written, 0, sum(each.tensor_bytes for each in main)),
    ]


def _layer_peak(run: Prepared, layouts: Sequence[FileLayout]) -> int:
    """The largest finished layer, one group of experts in full, and fp64 sums of one expert."""
    moe = run.moe
    largest = max(each.tensor_bytes for each in layouts)
    expert = max(moe.expert_bytes(layer) for layer in moe.layers)
    return 2 * largest + (moe.num_experts + 8) * expert


def _evaluate(run: Prepared) -> list[Row]:
    config = run.config.evaluate
    if config is None:
        return []
    domains, models = len(config.data.sources), 1 + len(run.variants)
    finished = len(list(run.folder.evaluation.glob("*/*.json.json")))
    vocabulary = int(run.moe.checkpoint.config["vocab_size"])
    logits = config.batch_size * config.data.sequence_length * vocabulary * 4
    reference = domains * config.kl_positions * vocabulary * 4
    weights = run.moe.checkpoint.nbytes
    read = weights + len(run.variants) * weights
    return [Row("evaluate", domains * models, finished, read, reference, weights + 3 * logits)]


def _done(units: Sequence[Unit]) -> int:
    return sum(read_marker(unit) is not None for unit in units)


def output_folder(run: Prepared) -> Path:
    """Where the compressed checkpoint will lie."""
    return run.folder.output(MAIN)
