"""Everything that can be known to be wrong is refused here, before any work.

Nothing is written, but what has to be fetched from behind URLs to be looked at.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from models.atomic import file_digest
from models.moe import MoeCheckpoint
from models.skeleton import check_dense_tensors
from orchestrator import run_folder, samples
from orchestrator.compatibility import (
    check_same_tokenizer,
    check_seq2seq,
    check_target,
    check_tokenizer,
    not_streamed,
)
from orchestrator.compression import check_compression
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.needs import check_needs
from orchestrator.notes import notes
from orchestrator.recoverable import check_recovery
from orchestrator.remote import model_folder
from orchestrator.run_folder import MAIN, RunFolder
from orchestrator.sizing import sized
from stages.calibrate.statistics import layers_of, metadata_of, read_statistics
from stages.corpus.config import CorpusConfig
from stages.corpus.read import check_source
from stages.errors import BudgetError, DataError, StatisticsError
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.export.layout import FileLayout, file_layouts, placeholder, router_groups, sizes
from stages.group.budget import adaptive, total_experts, uniform
from stages.group.config import METHODS, AnyMethod, Budget, Coalesce, Frequency, McSmoe, Reap
from stages.group.decision import LayerDecision, from_labels
from stages.group.width import check_kernels, kept_steps, kept_width, spread
from stages.unit import beside
from stages.verify.stage import identity


@dataclass(frozen=True)
class Variant:
    """One compressed model of a run: the method that was asked for, or a pruning baseline."""

    name: str
    method: AnyMethod
    export: ExportConfig


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs were looked at and found in order."""

    config: RunConfig
    folder: RunFolder
    moe: MoeCheckpoint
    model: str  # fingerprint
    tokenizer: Path
    variants: tuple[Variant, ...]
    resumes: bool
    calibration_domains: int
    evaluation_domains: int
    # What the reader of the report should know about this checkpoint.
    notes: tuple[str, ...] = ()
    # How thorough the refit is, and why.
    sizing: str = ""


def prepare(config: RunConfig) -> Prepared:
    """Opens the model, looks at data, budget, statistics, disk and memory; writes nothing, or,
    where inputs are URLs, what it looks at into `fetched/` of the run folder.

    Raises:
        UserError: with cause, numbers and remedy.
    """
    # What is written depends on the engine, which is chosen for a prepared run.
    from orchestrator.machine import check_machine

    prepared = described(config)
    check_machine(prepared)
    return prepared


def described(config: RunConfig) -> Prepared:
    """What `prepare` finds, whatever machine this is.

    Raises:
        UserError: with cause, numbers and remedy.
    """
    folder = RunFolder(config.run_dir.absolute())
    moe = MoeCheckpoint.open(model_folder(config, folder), allow_links=config.model.allow_links)
    copied = check_dense_tensors(moe)
    sizing = sized(config, moe, folder)
    config = sizing.config
    check_ranks(config.executor.ranks_per_replica, moe)
    _check_engine(config, moe)
    evaluate = config.evaluate
    calibrated = None if config.calibrate.statistics is not None else config.calibrate.data
    calibration_domains = _check_text(calibrated, moe, folder)
    evaluation_domains = _check_text(None if evaluate is None else evaluate.data, moe, folder)
    model = identity(moe.checkpoint)
    tokenizer = config.model.tokenizer or moe.checkpoint.folder
    if config.calibrate.statistics is not None:
        check_statistics(config.calibrate.statistics, moe, model, tokenizer)
        samples.layer_inputs(folder, config.calibrate, moe)
    observed = samples.observed(folder, config.calibrate).calibration_tokens
    check_target(
        config, not_streamed(moe), moe.family.behind_experts(moe.checkpoint.config), observed
    )
    check_needs(config, folder, moe, calibration_domains)
    found = _variants(config, moe)
    for variant in found:
        expected_decisions(variant, moe)
    _check_recovery(config, moe, folder)
    check_compression(config, moe, expected_decisions(found[0], moe))
    resumes = run_folder.check(folder, config, model)
    if not any((tokenizer / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise DataError(f"{tokenizer} holds no tokenizer", "set `model.tokenizer`")
    check_tokenizer(tokenizer, moe.checkpoint.config)
    return Prepared(
        config=config,
        folder=folder,
        moe=moe,
        model=model,
        tokenizer=tokenizer.absolute(),
        variants=found,
        resumes=resumes,
        calibration_domains=len(calibration_domains),
        evaluation_domains=len(evaluation_domains),
        notes=notes(moe, copied, found),
        sizing=sizing.why,
    )


def _check_recovery(config: RunConfig, moe: MoeCheckpoint, folder: RunFolder) -> None:
    """Refuses a recovery that cannot be done, its text and its teacher included."""
    if config.recover is None:
        return
    _check_text(config.recover.data or config.calibrate.data, moe, folder)
    tokenizer = config.model.tokenizer or moe.checkpoint.folder
    check_recovery(config.recover, moe, not_streamed(moe), tokenizer)


def _check_engine(config: RunConfig, moe: MoeCheckpoint) -> None:
    ranks = config.executor.ranks_per_replica
    why = not_streamed(moe)
    if why is not None and (ranks > 1 or config.calibrate.engine == "streaming"):
        raise ConfigError(
            f"{moe.checkpoint.folder} is observed by one process that holds all of it: {why}",
            "set calibrate.engine=resident and executor.ranks_per_replica=1",
        )
    check_seq2seq(config, moe.checkpoint.config)


def check_ranks(ranks: int, moe: MoeCheckpoint) -> None:
    """Refuses replicas whose ranks would hold different numbers of experts, or cannot start.

    Raises:
        ConfigError: with the numbers of ranks that are possible.
    """
    if ranks > 1 and find_spec("deepspeed") is None:
        raise ConfigError(
            f"executor.ranks_per_replica={ranks} needs DeepSpeed, which is not installed",
            "pip install 'coalesce-moe[deepspeed]'",
        )
    experts = moe.num_experts
    if experts % ranks:
        possible = [str(count) for count in range(1, experts + 1) if experts % count == 0]
        raise ConfigError(
            f"{experts} experts per layer cannot be dealt out evenly to {ranks} ranks",
            f"set executor.ranks_per_replica to one of {', '.join(possible)}",
        )


def expected_decisions(variant: Variant, moe: MoeCheckpoint) -> list[LayerDecision]:
    """Decisions with the counts of the budget (spread evenly), refused if they cannot be met."""
    method, form = variant.method, FORMATS[variant.export.format]
    unknown = sorted(set(method.skip_layers) - set(moe.layers))
    if unknown:
        raise BudgetError(
            f"skip_layers names {unknown}, the model's MoE layers are"
            f" {moe.layers[0]} to {moe.layers[-1]}",
            "correct `group.skip_layers`",
        )
    if isinstance(method, Coalesce):
        decisions = narrowed(moe, method, variant.export)
        form.check(moe, decisions)
        return decisions
    skipped = method.skipped(moe.layers)
    merged = [layer for layer in moe.layers if layer not in skipped]
    if not merged:
        return placeholder(moe, dict.fromkeys(moe.layers, moe.num_experts))
    total = total_experts(method.budget, len(merged), moe.num_experts, sizes(moe, variant.export))
    if method.uneven:
        _refuse_native("group.scope=global", "uniform", "number of experts", variant.export)
    kept = _spread_evenly(method, merged, total, moe.num_experts)
    groups = router_groups(moe, variant.export)
    for count in kept.values():
        method.check(moe.num_experts // groups, count // groups)
    kept |= dict.fromkeys(skipped, moe.num_experts)
    decisions = placeholder(moe, kept)
    if method.may_drop:
        decisions = [_pruned(decision) for decision in decisions]
    form.check(moe, decisions)
    return decisions


def narrowed(moe: MoeCheckpoint, method: Coalesce, export: ExportConfig) -> list[LayerDecision]:
    """All experts, or as many as are asked for, of the width that the budget leaves; as even as can
    be, where it is divided."""
    kept = method.left or moe.num_experts
    method.check(moe.num_experts, kept)
    found = sizes(moe, export, kept).widths
    assert found is not None
    width = kept_width(method.budget, moe.num_experts, found, method.multiple)
    layers = len(moe.layers)
    widths = [width] * layers
    if export.format == "native":
        check_kernels(width, halves=moe.meta_expert(moe.layers[0]).down.element_size() < 4)
    if method.uneven:
        _refuse_native(f"group.divide={method.divide}", "uniform", "width", export)
        total = kept_steps(method.budget, moe.num_experts, found, method.multiple, layers)
        widths = spread(total, layers, method.multiple)
    whole = placeholder(moe, dict.fromkeys(moe.layers, kept))
    if kept < moe.num_experts:
        whole = [_pruned(each) for each in whole]
    return [replace(each, width=width) for each, width in zip(whole, widths, strict=True)]


def _refuse_native(option: str, even: str, what: str, export: ExportConfig) -> None:
    if export.format == "native":
        raise BudgetError(
            f"{option} gives every layer its own {what}, which the native format cannot hold",
            f"use {option.partition('=')[0]}={even}, or export.format=mapped",
        )


def _spread_evenly(
    method: AnyMethod, layers: list[int], total: int, num_experts: int
) -> dict[int, int]:
    if not (isinstance(method, McSmoe) and method.scope == "global"):
        return uniform(total, layers, num_experts)
    # Frequencies that fall with the expert's id in every layer alike fill the layers in turn.
    falling = np.arange(num_experts, 0, -1)
    return adaptive(total, dict.fromkeys(layers, falling), method.min_per_layer)


def _pruned(decision: LayerDecision) -> LayerDecision:
    kept = set(decision.representatives)
    labels = [expert if expert in kept else None for expert in range(len(decision.group))]
    return from_labels(decision.layer, labels, decision.weight)


def expected_layouts(variant: Variant, moe: MoeCheckpoint) -> list[FileLayout]:
    """Output files before anything is decided; exact for a uniform budget."""
    return file_layouts(moe, expected_decisions(variant, moe), variant.export)


def student_layouts(run: Prepared) -> list[FileLayout]:
    """Files that training starts from: those of the main variant, or those with all rows of S."""
    main = run.variants[0]
    if run.config.pruning is not None:
        main = replace(main, export=main.export.all_rows)
    return expected_layouts(main, run.moe)


def in_experts(variant: Variant, moe: MoeCheckpoint) -> Variant:
    """A budget in bytes as the most experts whose files fit into it, to the byte.

    Raises:
        BudgetError: the smallest possible output is larger.
    """
    method, target = variant.method, variant.method.budget.target_bytes
    if isinstance(method, Coalesce):
        return variant  # neurons are fine enough for the arithmetic alone
    merged = len(set(moe.layers) - method.skipped(moe.layers))
    if target is None:
        return variant

    def with_experts(total: int) -> Variant:
        budget = Budget(experts_per_layer=max(total, 1) / max(merged, 1))
        return replace(variant, method=method.model_copy(update={"budget": budget}))

    def size(total: int) -> int:
        layouts = expected_layouts(with_experts(total), moe)
        if not method.uneven:
            return sum(layout.file_bytes for layout in layouts)
        # How a global budget falls on the layers moves a few digits of the headers: full ones
        # are an upper bound.
        return sum(layout.tensor_bytes for layout in layouts) + headers

    full = expected_layouts(with_experts(merged * moe.num_experts), moe)
    headers = sum(layout.file_bytes - layout.tensor_bytes for layout in full)
    fewest = moe.native_count(1) if variant.export.format == "native" else 1
    step = 1 if method.uneven else max(merged, 1) * router_groups(moe, variant.export)
    counts = range(fewest * merged, merged * moe.num_experts + 1, step)
    fitting = bisect_right(counts, target, key=size)
    if not fitting:
        raise BudgetError(
            f"target_bytes is {target:,}; the smallest possible output, {fewest} of"
            f" {moe.num_experts} experts in every merged layer, takes {size(counts[0]):,} bytes",
            "raise `group.budget.target_bytes`",
        )
    return with_experts(counts[fitting - 1])


def check_statistics(path: Path, moe: MoeCheckpoint, model: str, tokenizer: Path) -> None:
    """Refuses statistics that were observed on another model, or on text cut otherwise.

    Raises:
        StatisticsError: with both fingerprints or dimensions.
    """
    _check_digest(path)
    table = read_statistics(path)
    seen = metadata_of(table).get("model", "none")
    if seen != model:
        raise StatisticsError(
            f"{path} was observed on another model (fingerprint {seen[:12]}, this model's is"
            f" {model[:12]})",
            "calibrate on this model, or correct `model.path`",
        )
    check_same_tokenizer(path, metadata_of(table), tokenizer)
    layers = [each.layer for each in layers_of(table)]
    if layers != list(moe.layers):
        raise StatisticsError(f"{path} covers layers {layers}, the model has {list(moe.layers)}")


def _check_digest(path: Path) -> None:
    """Arrow reads flipped bits without a word; a run writes the digest beside its statistics."""
    with suppress(OSError, ValueError):
        recorded = json.loads(beside(path).read_text())
        if isinstance(recorded, str) and recorded != file_digest(path):
            raise StatisticsError(
                f"{path} is damaged: its SHA-256 is not the one in {beside(path)}",
                "copy both files again, or calibrate again",
            )


def _variants(config: RunConfig, moe: MoeCheckpoint) -> tuple[Variant, ...]:
    main = in_experts(Variant(MAIN, config.group, config.written), moe)
    names = config.evaluate.baselines if config.evaluate is not None else ()
    budget = Budget(experts_per_layer=_baseline_experts(main, moe))
    return (main, *(Variant(name, _pruning(name, budget), ExportConfig()) for name in names))


def _pruning(name: str, budget: Budget) -> Frequency | Reap:
    made = METHODS[name](budget=budget)
    assert isinstance(made, Frequency | Reap)
    return made


def _baseline_experts(main: Variant, moe: MoeCheckpoint) -> int:
    """Experts per layer of plain pruning at the bytes of the main variant.

    At least as many as it keeps; where it makes them smaller, the number that comes nearest in
    bytes.
    """
    decisions = expected_decisions(main, moe)
    total = sum(len(decision.representatives) for decision in decisions)
    each = -(-total // len(decisions))
    if main.method.narrows or main.export.compress is not None:
        plain = sizes(moe, ExportConfig())
        size = sum(layout.file_bytes for layout in expected_layouts(main, moe))
        each = round((size - plain.fixed) / (plain.per_expert * plain.layers))
    return moe.native_count(min(max(each, moe.top_k), moe.num_experts))


def _check_text(data: CorpusConfig | None, moe: MoeCheckpoint, folder: RunFolder) -> set[str]:
    """The domains of a corpus whose text was found in order; none when there is no corpus."""
    if data is None:
        return set()
    domains = {domain for source in data.sources for domain in check_source(source, folder.fetched)}
    _check_length(data, moe)
    return domains


def _check_length(data: CorpusConfig, moe: MoeCheckpoint) -> None:
    limit = moe.checkpoint.config.get("max_position_embeddings")
    if isinstance(limit, int) and data.sequence_length > limit:
        raise DataError(
            f"sequence_length is {data.sequence_length:,}, the model knows {limit:,} positions",
            f"set sequence_length to {limit:,} or less",
        )
