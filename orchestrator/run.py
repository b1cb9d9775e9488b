"""The main job: observe, decide, transform, write, prove. Safe to kill and to repeat anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from models.arrow import read_table, write_table
from models.atomic import file_digest, write_bytes, write_json
from models.remote.origin import held_here
from orchestrator import (
    chain,
    engine,
    estimate,
    pipeline,
    recovery,
    run_folder,
    samples,
    shared,
    threshold,
)
from orchestrator.decide import decide
from orchestrator.events import EventLog, Listener
from orchestrator.interrupt import heeding_signals
from orchestrator.lock import exclusive
from orchestrator.needs import attached
from orchestrator.predictions import predicted, sampled_sums
from orchestrator.preflight import Prepared, Variant
from orchestrator.report.card import render_card
from orchestrator.report.collect import Collected, collect, found_cautions
from orchestrator.report.write import write_report
from orchestrator.run_folder import MAIN, RECOVERED, RunFolder
from orchestrator.scheduler import Scheduler, open_executor
from stages.calibrate import coverage
from stages.calibrate import stage as calibrate
from stages.calibrate.statistics import LayerStatistics, layers_of, read_statistics
from stages.corpus import stage as corpus
from stages.corpus.stage import block_domains
from stages.errors import StatisticsError
from stages.evaluate import stage as evaluate
from stages.evaluate.stage import ORIGINAL
from stages.export import stage as export
from stages.export.layout import FileLayout, file_layouts
from stages.group.decision import LayerDecision, to_table
from stages.group.super_experts import protected_lines
from stages.group.task import task_layers
from stages.inputs import stage as inputs
from stages.probe import stage as probe
from stages.subsample import stage as subsample
from stages.unit import beside, read_marker
from stages.upload import stage as upload
from stages.verify import stage as verify


@dataclass(frozen=True)
class Decided:
    """A variant with its decisions and the files that follow from them."""

    variant: Variant
    decisions: list[LayerDecision]
    layouts: list[FileLayout]

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(layout.file_bytes for layout in self.layouts)


def run(prepared: Prepared, listeners: Sequence[Listener] = ()) -> Path:
    """Runs whatever is not done yet; returns the folder of the report."""
    folder = prepared.folder
    with _started(prepared, listeners) as (events, scheduler):
        if prepared.config.upload is not None:
            upload.claim(prepared.config.upload.url, folder.upload)
        statistics = _observe(prepared, scheduler, events)
        _probe(prepared, scheduler)
        decided = _decide(prepared, scheduler, statistics, events)
        prepared, decided = _threshold(prepared, scheduler, decided)
        written = _write_models(prepared, scheduler, decided, events)
        trained = None
        if prepared.config.recover is not None:
            trained = recovery.recovered(prepared, scheduler, events, written)
        measured = _measure(prepared, scheduler, decided, events)
        if trained is not None:
            prepared = recovery.trained_variant(prepared, trained)
            decided = [replace(decided[0], layouts=list(trained.layouts)), *decided[1:]]
        for message in _report(prepared, scheduler, statistics, decided, measured):
            events.emit("warning", message=message)
        _upload(prepared, scheduler)
    _remove_baselines(prepared)
    events.emit("run_done", report=str(folder.report / "index.html"))
    return folder.report


def observe(prepared: Prepared, listeners: Sequence[Listener] = ()) -> Path:
    """The first half of a run: the statistics table, for this run and any later one."""
    with _started(prepared, listeners) as (events, scheduler):
        statistics = layers_of(_observe(prepared, scheduler, events))
    for message in coverage.warnings(statistics, prepared.config.calibrate.min_tokens_per_expert):
        events.emit("warning", message=message)
    events.emit("observed", statistics=str(prepared.folder.statistics))
    return prepared.folder.statistics


@contextmanager
def _started(
    prepared: Prepared, listeners: Sequence[Listener]
) -> Iterator[tuple[EventLog, Scheduler]]:
    """Claims the folder and opens the executor."""
    folder, config = prepared.folder, prepared.config.executor
    run_folder.claim(folder, prepared.config, prepared.model)
    events = EventLog(folder.events, listeners)
    events.emit("run_started", run=str(folder.root), resumes=prepared.resumes)
    with (
        exclusive(folder) as before,
        open_executor(config) as executor,
        heeding_signals() as stop,
    ):
        if before is not None:
            events.emit("taken_over", holder=before)
        shared.check(prepared, executor)
        checkpoint = prepared.moe.checkpoint
        if checkpoint.origin is not None and checkpoint.origin.cache is not None:
            executor.locate(partial(held_here, checkpoint.folder))
        events.listen(executor.heed)
        yield events, Scheduler(executor, events, config.gpus_per_worker, stop, folder.logs)
        _sweep(folder)


def _sweep(folder: RunFolder) -> None:
    """Removes what killed attempts left behind. Every unit is done, so nothing of it is live."""
    # The second pattern: safetensors writes under a temporary name of its own.
    for leftover in [*folder.root.rglob(".*.tmp"), *folder.root.rglob(".tmp*")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _observe(prepared: Prepared, scheduler: Scheduler, events: EventLog) -> pa.Table:
    """Verify, tokenise, calibrate: the statistics table, on disk and in hand."""
    config, folder = prepared.config, prepared.folder
    if config.model.verify == "full":
        units = verify.plan(prepared.moe.checkpoint, folder.verify)
        scheduler.run("verify", units, verify.run_one, estimate.verify(prepared))
    texts = pipeline.corpus_units(prepared)
    scheduler.run("corpus", texts, corpus.run_one, estimate.corpus(prepared))
    if config.calibrate.statistics is not None:
        table = read_statistics(config.calibrate.statistics)
    else:
        samples.check(config.calibrate, prepared.moe)
        choice = engine.choose(prepared)
        _tell(events, "calibrate", choice)
        shards = pipeline.calibrate_units(prepared, choice.engine)
        replicas = pipeline.replicas(prepared)
        memory = choice.worker_bytes
        scheduler.run_model("calibrate", shards, calibrate.make_worker, memory, replicas)
        _sample(prepared, scheduler, shards)
        table = calibrate.reduce(shards)
    return _settle(folder.statistics, table)


def _tell(events: EventLog, stage: str, choice: engine.Choice) -> None:
    """Of the later stages only where a whole model does not fit."""
    if stage == "calibrate" or choice.engine == "streaming":
        events.emit("engine", stage=stage, engine=choice.engine, why=choice.why)


def _sample(
    prepared: Prepared, scheduler: Scheduler, shards: Sequence[calibrate.ShardUnit]
) -> None:
    """Layer by layer: what entered it, and what all its experts do with that."""
    joined = pipeline.inputs_units(prepared, shards)
    if joined:
        scheduler.run("inputs", joined, inputs.run_one, estimate.inputs(prepared))
    tables = pipeline.subsample_units(prepared, joined)
    if tables:
        memory = estimate.subsample(prepared)
        scheduler.run_model("subsample", tables, subsample.make_worker, memory)


def _probe(prepared: Prepared, scheduler: Scheduler) -> None:
    """What each size costs each layer alone, where the budget is divided by that."""
    if units := pipeline.probe_units(prepared):
        scheduler.run_model("probe", units, probe.make_worker, estimate.probe(prepared))


def _settle(path: Path, table: pa.Table, free: Sequence[str] = ()) -> pa.Table:
    """Writes a table that the driver made; an existing one must be the same, byte for byte.

    Columns in `free` decide nothing: where they alone differ, the table is written anew.
    """
    digest = beside(path)
    with suppress(FileNotFoundError, ValueError):
        if file_digest(path) == digest.read_text().strip().strip('"'):
            found = read_table(path)
            if found.equals(table, check_metadata=True):
                return found
            if not free or not _equal_but(free, found, table):
                raise StatisticsError(
                    f"{path} differs from what its inputs give", "use a new run_dir"
                )
    write_table(path, table)
    write_json(digest, file_digest(path))
    return table


def _equal_but(free: Sequence[str], found: pa.Table, table: pa.Table) -> bool:
    known = [name for name in table.column_names if name not in free]
    return bool(found.select(known).equals(table.select(known), check_metadata=True))


def _decide(
    prepared: Prepared, scheduler: Scheduler, table: pa.Table, events: EventLog
) -> list[Decided]:
    """Decisions of the main variant and the baselines, from the same statistics."""
    method = prepared.config.group
    statistics = task_layers(table, method.task)
    scarce = coverage.warnings(statistics, prepared.config.calibrate.min_tokens_per_expert)
    for message in (*prepared.notes, *scarce, *protected_lines(statistics, method)):
        events.emit("warning", message=message)
    with scheduler.here("group"):
        return [_decide_one(prepared, variant, statistics) for variant in prepared.variants]


def _decide_one(
    prepared: Prepared, variant: Variant, statistics: Sequence[LayerStatistics]
) -> Decided:
    config, moe = prepared.config, prepared.moe
    statistics = attached(config, variant.method, statistics, prepared.folder, moe)
    decisions = decide(config, variant, statistics, moe)
    metadata = {
        "method": variant.method.model_dump_json(),
        "experts_kept": str(sum(len(d.representatives) for d in decisions)),
        "model": prepared.model,
    }
    sampled = sampled_sums(config, config.group.task, prepared.folder, moe)
    errors = {layer: parts.tolist() for layer, parts in predicted(decisions, sampled).items()}
    table = to_table(decisions, metadata, errors)
    _settle(prepared.folder.decision(variant.name), table, free=["predicted_error"])
    return Decided(variant, decisions, file_layouts(prepared.moe, decisions, variant.export))


def _threshold(
    prepared: Prepared, scheduler: Scheduler, decided: list[Decided]
) -> tuple[Prepared, list[Decided]]:
    """The main variant with its rows of S per layer, where one threshold divides them."""
    main, settle = decided[0], partial(_settle, prepared.folder.kept_rows)
    variant = threshold.settled(prepared, main.variant, main.decisions, scheduler.run, settle)
    if variant is main.variant:
        return prepared, decided
    layouts = file_layouts(prepared.moe, main.decisions, variant.export)
    variants = (variant, *prepared.variants[1:])
    main = Decided(variant, main.decisions, layouts)
    return replace(prepared, variants=variants), [main, *decided[1:]]


def _write_models(
    prepared: Prepared, scheduler: Scheduler, decided: Sequence[Decided], events: EventLog
) -> export.ExportUnit:
    """Layer files of all variants fan out together; then every folder is assembled and tried.

    Returns:
        the main variant's folder, before any training.
    """
    needed = [each for each in decided if not _measured_already(prepared, each)]
    plans = [
        pipeline.transform_units(prepared, each.variant, each.decisions, each.layouts)
        for each in needed
    ]
    main, others = needed[0], [unit for units in plans[1:] for unit in units]
    variant, decisions = main.variant, main.decisions
    first = recovery.starting(prepared, plans[0])
    plans[0] = chain.written(prepared, variant, decisions, first, scheduler.run, others)
    choice = engine.gate(prepared, decided[0].layouts)
    _tell(events, "export", choice)
    exports = [
        pipeline.export_unit(
            prepared, each.variant, each.decisions, each.layouts, units, choice.engine
        )
        for each, units in zip(needed, plans, strict=True)
    ]
    scheduler.run("export", exports, export.run_one, choice.worker_bytes)
    return exports[0]


def _measured_already(prepared: Prepared, decided: Decided) -> bool:
    """True for a baseline whose numbers are in: its checkpoint is not needed again."""
    name = decided.variant.name
    if name == MAIN or prepared.config.evaluate is None:
        return False
    units = pipeline.evaluate_units(prepared, name, _domains(prepared), decided.decisions)
    return all(read_marker(unit) is not None for unit in units)


def _domains(prepared: Prepared) -> list[str]:
    return block_domains(prepared.folder.evaluation_tokens)


def _measure(
    prepared: Prepared, scheduler: Scheduler, decided: Sequence[Decided], events: EventLog
) -> dict[str, dict[str, Any]]:
    """Variant -> perplexity and KL; the original first, since the others are compared with it."""
    if prepared.config.evaluate is None:
        return {}
    domains, choice = _domains(prepared), engine.evaluation(prepared)
    _tell(events, "evaluate", choice)
    plan = partial(pipeline.evaluate_units, prepared, domains=domains, engine=choice.engine)
    first = plan(ORIGINAL, decisions=[])
    rest = [u for each in decided for u in plan(each.variant.name, decisions=each.decisions)]
    if prepared.config.recover is not None:
        rest += plan(RECOVERED, decisions=decided[0].decisions)
    memory = choice.worker_bytes
    outcomes = scheduler.run_model("evaluate", first, evaluate.make_worker, memory)
    outcomes += scheduler.run_model("evaluate", rest, evaluate.make_worker, memory)
    results: dict[str, dict[str, Any]] = {}
    for unit, done in zip([*first, *rest], outcomes, strict=True):
        results.setdefault(unit.variant, {})[unit.domain] = done.result
    return {variant: evaluate.reduce(by_domain) for variant, by_domain in results.items()}


def _report(
    prepared: Prepared,
    scheduler: Scheduler,
    statistics: pa.Table,
    decided: Sequence[Decided],
    measured: dict[str, dict[str, Any]],
) -> list[str]:
    """The report, and the model card in the output; returns what the reader should beware of."""
    folder = prepared.folder
    with scheduler.here("report"):
        found = Collected(
            prepared=prepared,
            statistics=statistics,
            decisions=decided[0].decisions,
            layouts=decided[0].layouts,
            baseline_bytes={each.variant.name: each.file_bytes for each in decided[1:]},
            measured=measured,
            done=scheduler.done,
        )
        report = collect(found)
        write_report(report, folder.report)
        # What decides the result, and nothing about the machine that it was made on.
        card = render_card(report, yaml.safe_dump(run_folder.settled(prepared.config)))
        write_bytes(folder.output(MAIN) / "README.md", card.encode())
    return found_cautions(found)


def _upload(prepared: Prepared, scheduler: Scheduler) -> None:
    """Sends every file of the output, and when all have arrived the one that makes it count."""
    target = prepared.config.upload
    if target is None:
        return
    units = upload.plan(prepared.folder.output(MAIN), target.url, prepared.folder.upload)
    upload.forget_stale(units)
    scheduler.run("upload", units[:-1], upload.run_one, estimate.PROCESS_BYTES)
    upload.check_complete(units[:-1])
    scheduler.run("upload", units[-1:], upload.run_one, estimate.PROCESS_BYTES)


def _remove_baselines(prepared: Prepared) -> None:
    """Frees what was written only to be measured; numbers and decisions stay."""
    if prepared.config.evaluate is not None and not prepared.config.evaluate.keep_baselines:
        for variant in pipeline.baselines(prepared):
            shutil.rmtree(prepared.folder.output(variant.name), ignore_errors=True)
            shutil.rmtree(prepared.folder.layers(variant.name), ignore_errors=True)
