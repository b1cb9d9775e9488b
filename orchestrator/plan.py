"""What a run would do, before anything is spent: units, bytes, memory, what is already done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from orchestrator import disk, engine, estimate, flops, pipeline, samples
from orchestrator.estimate import human
from orchestrator.needs import needs
from orchestrator.preflight import (
    Prepared,
    expected_decisions,
    expected_layouts,
    student_layouts,
)
from stages.compress.config import CompressConfig
from stages.compress.layer import applies
from stages.group.decision import LayerDecision
from stages.transform.stage import file_name
from stages.unit import Unit, beside, read_marker
from stages.verify import stage as verify


@dataclass(frozen=True)
class Row:
    """One stage of the plan. Bytes are upper bounds; memory is an estimate, from headers alone."""

    stage: str
    units: int
    done: int
    read_bytes: int
    written_bytes: int
    peak_bytes: int


def rows(run: Prepared) -> list[Row]:
    """One row per stage, in order."""
    observed = [_verify(run), _corpus(run), _calibrate(run), *_sample(run)]
    reduced = [*observed, *_probe(run), *_models(run)]
    return [*reduced, *_recover(run), *_evaluate(run), *_upload(run)]


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
    compress = run.config.compress
    # What the threshold leaves of its bytes, and digits of headers, are known once it has decided.
    exactly = "about" if compress is not None and compress.threshold == "global" else "exactly"
    text = ""
    if run.config.calibrate.statistics is None:
        choice = engine.choose(run)
        text = f"\ncalibrate: {choice.engine} engine: {choice.why}"
        if hidden := disk.hidden_bytes(run):
            text += (
                f"; hidden states of {disk.shards_at_once(run)} shards at a time take up to"
                f" {human(hidden)} of disk"
            )
    if run.config.refit.applies(run.variants[0].method.narrows):
        text += f"\nrefit: {run.sizing}"
    for stage, choice in _by_layers(run):
        text += f"\n{stage}: {choice.engine} engine: {choice.why}"
    if lacking := disk.cache_bytes(run):
        text += (
            f"\ncache: up to {human(lacking)} are fetched to {run.config.cache.dir} of each node"
        )
    return (
        f"{run.moe.family.model_type}, {len(run.moe.layers)} MoE layers of {run.moe.num_experts}"
        f" experts, top-{run.moe.top_k}: {human(before)} -> {human(after)}"
        f" ({after / before:.1%}), {exactly} {after:,} bytes of weights;"
        f" {human(disk.peak_bytes(run))} of disk at the peak;"
        f" {_operations(run)}{text}{_training(run)}"
    )


def _training(run: Prepared) -> str:
    """Steps and tokens of the recovery."""
    config = run.config.recover
    if config is None:
        return ""
    data = config.data or run.config.calibrate.data
    tokens = config.steps * config.batch * data.sequence_length
    return (
        f"\nrecover: {config.steps:,} steps of {config.batch} blocks, up to {tokens:,} tokens"
        f" ({tokens / data.tokens:.1f} times the text), mode {config.mode}; the teacher's"
        f" predictions take up to {human(estimate.taught_bytes(run))} while they are needed;"
        f" each of {config.ranks} rank(s) needs about {human(estimate.recover(run))} of memory"
        f"{_pruning(run, config.steps)}"
    )


def _pruning(run: Prepared, steps: int) -> str:
    """When rows of S go, where they go in training."""
    pruning = run.config.pruning
    if pruning is None:
        return ""
    warmup, final = pruning.phases(steps)
    size = sum(each.file_bytes for each in student_layouts(run))
    return (
        f"; rows of S go by sensitivity after steps {warmup:,} to {steps - final:,}, from all"
        f" ({human(size)}) to {pruning.target:.3g} of them"
    )


def _by_layers(run: Prepared) -> Iterator[tuple[str, engine.Choice]]:
    """The later stages that do not hold whole models."""
    layouts = expected_layouts(run.variants[0], run.moe)
    found = [("export", engine.gate(run, layouts))]
    if run.config.evaluate is not None:
        found.append(("evaluate", engine.evaluation(run)))
    return ((stage, choice) for stage, choice in found if choice.engine == "streaming")


def _operations(run: Prepared) -> str:
    """Of one token, before and after; with `compress`, also the values that are left."""
    moe, compress = run.moe, run.config.compress
    decisions = expected_decisions(run.variants[0], moe)
    small = compress if run.config.export.format == "mapped" else None
    before, after = flops.per_token(moe), flops.per_token(moe, decisions, small)
    unit, name = (1e9, "GFLOP") if before >= 1e9 else (1e6, "MFLOP")
    text = f"{before / unit:.3g} -> {after / unit:.3g} {name} per token ({after / before:.1%})"
    return text if compress is None else f"{text};{_arithmetic(run, decisions, compress)}"


def _arithmetic(run: Prepared, decisions: Sequence[LayerDecision], compress: CompressConfig) -> str:
    """Of experts as U V + S, whatever the format: `native` and `expanded` write them out."""
    moe = run.moe
    whole, merged, small = (
        flops.parameters(moe),
        flops.parameters(moe, decisions),
        flops.parameters(moe, decisions, compress),
    )
    share = flops.per_token(moe, decisions, compress) / flops.per_token(moe)
    text = (
        f"\nvalues: {_millions(whole)} -> {_millions(merged)} merged, each expert once"
        f" -> {_millions(small)} with U V + S"
    )
    if run.config.export.format != "mapped":
        text += (
            f" ({share:.1%} of the FLOPs per token); export.format={run.config.export.format}"
            " writes U V + S out and computes whole matrices"
        )
    return text


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count:,}"


def _verify(run: Prepared) -> Row:
    checkpoint = run.moe.checkpoint
    if run.config.model.verify == "headers":
        return Row("verify", 0, 0, 0, 0, 0)
    units = verify.plan(checkpoint, run.folder.verify)
    peak = estimate.verify(run)
    return Row("verify", len(units), _done(units), checkpoint.file_bytes, 0, peak)


def _corpus(run: Prepared) -> Row:
    units = pipeline.corpus_units(run)
    tokens = sum(unit.config.tokens for unit in units)
    return Row("corpus", len(units), _done(units), 0, 4 * tokens, estimate.corpus(run))


def _calibrate(run: Prepared) -> Row:
    config, moe = run.config.calibrate, run.moe
    shards = 0 if config.statistics is not None else config.shards
    finished = len(list(run.folder.shards.glob("*.arrow.json")))
    written = estimate.statistics_bytes(run) * (shards + run.calibration_domains)
    if not shards:
        return Row("calibrate", 0, 0, 0, written, 0)
    choice = engine.choose(run)
    # A resident worker reads the model once, a streaming one for every shard.
    times = shards if choice.engine == "streaming" else min(engine.worker_count(run), shards)
    read, peak = moe.checkpoint.nbytes * times, choice.worker_bytes
    return Row("calibrate", shards, min(finished, shards), read, written, peak)


def _sample(run: Prepared) -> list[Row]:
    config, moe = run.config.calibrate, run.moe
    layers, size = len(moe.layers), samples.layer_bytes(config, moe)
    if not size:
        return []

    def finished(folder: Path, kind: str) -> int:
        return min(len(list(folder.glob(f"*.{kind}.json"))), layers)

    done, peak = finished(run.folder.inputs, "safetensors"), estimate.inputs(run)
    found = [Row("inputs", layers, done, layers * size, layers * size, peak)]
    if samples.evaluated(config, moe):
        experts = sum(moe.num_experts * moe.expert_bytes(layer) for layer in moe.layers)
        written = layers * run.calibration_domains * samples.table_size(moe)
        done, peak = finished(run.folder.subsample, "arrow"), estimate.subsample(run)
        found.append(Row("subsample", layers, done, layers * size + experts, written, peak))
    return found


def _probe(run: Prepared) -> list[Row]:
    if "probe" not in needs(run.config, run.variants[0].method):
        return []
    layers, read = len(run.moe.layers), run.moe.checkpoint.nbytes
    done = min(len(list(run.folder.probe.glob("*.arrow.json"))), layers)
    return [Row("probe", layers, done, read, 0, estimate.probe(run))]


def _models(run: Prepared) -> list[Row]:
    files, done, written, exported = 0, 0, 0, 0
    for variant in run.variants:
        layouts = expected_layouts(variant, run.moe)
        folder = run.folder.layers(variant.name)
        files += len(layouts)
        done += sum(beside(folder / file_name(each.layer)).exists() for each in layouts)
        written += sum(each.file_bytes for each in layouts)
        exported += beside(pipeline.output_of(run, variant.name)).exists()
    if run.config.pruning is not None:
        written += sum(each.file_bytes for each in student_layouts(run))
    variants, read = len(run.variants), run.moe.checkpoint.file_bytes * len(run.variants)
    main = expected_layouts(run.variants[0], run.moe)
    return [
        *_threshold(run),
        *_carry(run),
        Row("transform", files, done, read, written, estimate.transform(run)),
        # Layer files become the output by hard links: nothing is written twice.
        Row("export", variants, exported, written, 0, engine.gate(run, main).worker_bytes),
    ]


def _threshold(run: Prepared) -> list[Row]:
    """Layers are merged and decomposed once more where one threshold divides S over all of them."""
    config, moe = run.config.compress, run.moe
    if config is None or config.threshold == "layer":
        return []
    layers = [layer for layer in moe.layers if applies(config, layer)]
    read = sum(moe.layer_bytes(layer) for layer in layers)
    done = min(len(list(run.folder.threshold.glob("*.arrow.json"))), len(layers))
    return [Row("threshold", len(layers), done, read, 0, estimate.transform(run))]


def _carry(run: Prepared) -> list[Row]:
    """Text from block to block of layers: every layer is read once as it was, by each part of the
    text, and once reduced."""
    size = run.config.refit.together
    if size is None or not run.config.refit.applies(run.variants[0].method.narrows):
        return []
    parts = run.config.calibrate.shards
    blocks = -(-len(run.moe.layers) // size)
    read = parts * (run.moe.checkpoint.nbytes * 2) + 2 * blocks * estimate.stream_bytes(run)
    written = 2 * blocks * estimate.stream_bytes(run)
    finished = len(list(run.folder.refit.glob("*/*.safetensors.json")))
    return [Row("carry", parts * blocks, finished, read, written, estimate.carry(run))]


def _recover(run: Prepared) -> list[Row]:
    """The teacher reads the original once, or once per part where it is streamed."""
    config = run.config.recover
    if config is None:
        return []
    size = sum(each.file_bytes for each in student_layouts(run))
    trained = beside(run.folder.recover / "trained").exists()
    state = estimate.state_bytes(run) * -(-config.steps // config.checkpoint_every)
    peak = estimate.recover(run)
    row = Row("recover", 1, int(trained), size, size + state, peak)
    if not config.alpha:
        return [row]
    parts = config.teacher.shards
    done = parts if trained else min(len(list(run.folder.taught.glob("*.arrow.json"))), parts)
    how = engine.teacher(run)
    read = run.moe.checkpoint.nbytes * (parts if how == "streaming" else 1)
    peak = estimate.teach(run, how)
    return [Row("teach", parts, done, read, estimate.taught_bytes(run), peak), row]


def _evaluate(run: Prepared) -> list[Row]:
    config = run.config.evaluate
    if config is None:
        return []
    domains, models = run.evaluation_domains, 1 + len(run.variants)
    models += run.config.recover is not None
    finished = len(list(run.folder.evaluation.glob("*/*.json.json")))
    vocabulary = int(run.moe.checkpoint.config["vocab_size"])
    reference = domains * config.kl_positions * vocabulary * 4
    choice = engine.evaluation(run)
    # A streamed model is read again for every domain.
    times = domains if choice.engine == "streaming" else 1
    read, peak = run.moe.checkpoint.nbytes * models * times, choice.worker_bytes
    return [Row("evaluate", domains * models, finished, read, reference, peak)]


def _upload(run: Prepared) -> list[Row]:
    if run.config.upload is None:
        return []
    layouts = expected_layouts(run.variants[0], run.moe)
    size, files = sum(each.file_bytes for each in layouts), len(layouts)
    finished = len(list(run.folder.upload.glob("*/*.safetensors.json")))
    # Config, index and tokenizer are small, and not counted.
    return [Row("upload", files, min(finished, files), size, 0, estimate.PROCESS_BYTES)]


def _done(units: Sequence[Unit]) -> int:
    return sum(read_marker(unit) is not None for unit in units)
