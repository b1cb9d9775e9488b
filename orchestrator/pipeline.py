"""Which units every stage of a prepared run consists of. Pure: nothing is executed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.executor import Replicas
from models.atomic import text_digest
from orchestrator import recovery, run_folder, samples
from orchestrator.needs import needs
from orchestrator.preflight import Prepared, Variant
from orchestrator.run_folder import MAIN, RECOVERED
from stages.calibrate import stage as calibrate
from stages.calibrate.config import Engine
from stages.corpus.stage import (
    CorpusUnit,
    block_domains,
    count_blocks,
    data_digest,
    tokenizer_digest,
)
from stages.evaluate.stage import ORIGINAL, EvaluateUnit
from stages.export.formats import FORMATS
from stages.export.layout import FileLayout, file_layouts, placeholder
from stages.export.stage import ExportUnit
from stages.group.decision import LayerDecision
from stages.inputs import stage as inputs
from stages.probe import stage as probe
from stages.refit.config import PolishConfig, RefitConfig
from stages.settings import Settings
from stages.subsample import stage as subsample
from stages.transform import stage as transform
from stages.unit import Done, beside, read_digests


def corpus_units(run: Prepared) -> list[CorpusUnit]:
    """Calibration text (unless statistics are given), and held-out text (if it is measured)."""
    config, folder = run.config, run.folder
    units = []
    if config.calibrate.statistics is None:
        units.append(
            CorpusUnit(
                "corpus/calibration",
                config.calibrate.data,
                run.tokenizer,
                folder.calibration_tokens,
                None if config.evaluate is None else config.evaluate.data,
                config.calibrate.dedup,
                folder.fetched,
            )
        )
    if config.evaluate is not None:
        data = config.evaluate.data
        tokens, fetched = folder.evaluation_tokens, folder.fetched
        unit = CorpusUnit("corpus/evaluation", data, run.tokenizer, tokens, fetched=fetched)
        units.append(unit)
    if config.recover is not None:
        units.append(recovery.corpus_unit(run))
    return units


def calibrate_units(run: Prepared, engine: Engine) -> list[calibrate.ShardUnit]:
    """Shards of the calibration text, once it is tokenised."""
    if run.config.calibrate.statistics is not None:
        return []
    inputs = {
        "model": run.model,
        "tokenizer": tokenizer_digest(run.tokenizer),
        "data": data_digest(run.config.calibrate.data, run.folder.fetched),
        "corpus": read_digests(beside(run.folder.calibration_tokens)),
        "threads": str(run.config.executor.threads_per_unit),
    } | run_folder.autoep(run.config)
    config = run.config.calibrate
    return calibrate.plan(
        config.model_copy(update={"sample": samples.settled_sample(config, run.moe)}),
        blocks=count_blocks(run.folder.calibration_tokens),
        corpus=run.folder.calibration_tokens,
        model=run.moe.checkpoint.folder,
        num_experts=run.moe.num_experts,
        folder=run.folder.shards,
        inputs=inputs,
        engine=engine,
    )


def inputs_units(run: Prepared, shards: Sequence[calibrate.ShardUnit]) -> list[inputs.InputsUnit]:
    """One unit per MoE layer, once all shards are observed; none when nothing is sampled."""
    domains = block_domains(run.folder.calibration_tokens)
    return inputs.plan(shards, run.moe.layers, domains, run.folder.inputs)


def subsample_units(
    run: Prepared, layers: Sequence[inputs.InputsUnit]
) -> list[subsample.SubsampleUnit]:
    """One unit per MoE layer, once the inputs are joined."""
    if not run.config.calibrate.sample.statistics:
        return []
    return subsample.plan(
        layers,
        run.moe,
        model=run.model,
        threads=run.config.executor.threads_per_unit,
        folder=run.folder.subsample,
        most=run.config.calibrate.sample.statistics_tokens,
    )


def replicas(run: Prepared) -> Replicas[calibrate.ShardUnit, Done] | None:
    """How calibration is spread over ranks; None: a worker holds the whole model."""
    executor = run.config.executor
    if executor.ranks_per_replica == 1:
        return None
    from stages.calibrate.parallel import make_rank

    make = partial(make_rank, backend=run.config.calibrate.backend)
    return Replicas(executor.ranks_per_replica, make, executor.placement, executor.rank_timeout_s)


def transform_units(
    run: Prepared,
    variant: Variant,
    decisions: Sequence[LayerDecision],
    layouts: Sequence[FileLayout],
) -> list[transform.TransformUnit]:
    """One unit per file of a variant."""
    sampled = samples.layer_inputs(run.folder, run.config.calibrate, run.moe)
    return transform.plan(
        run.moe,
        decisions,
        layouts,
        align=run.config.align,
        merge=run.config.merge,
        export=variant.export,
        folder=run.folder.layers(variant.name),
        model=run.model,
        variant=variant.name,
        narrow=run.config.narrow,
        refit=refit_of(run, variant),
        task=variant.method.task,
        inputs={layer: (path, read_digests(beside(path))) for layer, path in sampled.items()},
    )


def probe_units(run: Prepared) -> list[probe.ProbeUnit]:
    """One unit per MoE layer where the main variant's budget is divided by measured damage."""
    config, variant, moe = run.config, run.variants[0], run.moe
    if "probe" not in needs(config, variant.method):
        return []
    neurons = moe.meta_expert(moe.layers[0]).neurons
    widths = sorted({max(1, round(ratio * neurons)) for ratio in config.probe.ratios})
    whole = placeholder(moe, dict.fromkeys(moe.layers, moe.num_experts))
    sizes: dict[int, list[transform.TransformUnit]] = {}
    for width in widths:
        decisions = [replace(each, width=width) for each in whole]
        layouts = file_layouts(moe, decisions, variant.export)
        for unit in transform_units(run, variant, decisions, layouts):
            if unit.layer is not None and unit.decision is not None:
                refit = alone(unit.refit) if config.probe.refit else without(unit.refit)
                sizes.setdefault(unit.layer, []).append(replace(unit, refit=refit))
    corpus = samples.observed(run.folder, config.calibrate).calibration_tokens
    return [
        probe.ProbeUnit(
            moe=moe,
            layer=layer,
            sizes=tuple(units),
            config=config.probe,
            corpus=corpus,
            corpus_digest=read_digests(beside(corpus)),
            dtype=config.calibrate.dtype,
            batch_size=config.calibrate.batch_size,
            output=run.folder.probe / probe.file_name(layer),
        )
        for layer, units in sizes.items()
    ]


def alone(refit: RefitConfig) -> RefitConfig:
    """As one layer is refitted for itself: a probe reduces no other, and there are many."""
    if refit.together is None:
        return refit
    steps = min(refit.polish.steps, PolishConfig().steps)
    polish = refit.polish.model_copy(update={"steps": steps, "last_layer": "outputs"})
    return refit.model_copy(update={"target": "original", "polish": polish})


def without(refit: RefitConfig) -> RefitConfig:
    """The same held-out blocks, and no refit."""
    return refit.model_copy(update={"enabled": False})


def refit_of(run: Prepared, variant: Variant) -> RefitConfig:
    """Whether this variant is refitted, and how; a baseline never is."""
    config = run.config.refit
    wanted = config.applies(variant.method.narrows) and variant.name == MAIN
    return config.model_copy(update={"enabled": wanted})


def export_unit(
    run: Prepared,
    variant: Variant,
    decisions: Sequence[LayerDecision],
    layouts: Sequence[FileLayout],
    units: Sequence[transform.TransformUnit],
    engine: Engine = "resident",
) -> ExportUnit:
    """The folder of a variant, from its finished layer files."""
    return ExportUnit(
        moe=run.moe,
        decisions=tuple(decisions),
        layouts=tuple(layouts),
        files=tuple(unit.output for unit in units),
        digests=tuple(read_digests(unit.marker) for unit in units),
        config=variant.export,
        threads=run.config.executor.threads_per_unit,
        output=output_of(run, variant.name),
        variant=variant.name,
        engine=engine,
    )


def evaluate_units(
    run: Prepared,
    variant: str,
    domains: Sequence[str],
    decisions: Sequence[LayerDecision],
    engine: Engine = "resident",
) -> list[EvaluateUnit]:
    """One unit per domain. A variant is identified by what it is made from, not by its files,
    so that a baseline can be removed once it was measured."""
    config = run.config.evaluate
    assert config is not None
    export = next((v.export for v in run.variants if v.name == untrained_name(variant)), None)
    inputs = {
        "model": run.model,
        "corpus": read_digests(beside(run.folder.evaluation_tokens)),
        "threads": str(run.config.executor.threads_per_unit),
    }
    if export is not None:
        made: list[Any] = [
            (d.layer, d.group, d.representatives, d.weight, d.width) for d in decisions
        ]
        which = next(v for v in run.variants if v.name == untrained_name(variant))
        refit = refit_of(run, which)
        made.append(which.method.task)
        sections: tuple[Settings, ...] = (
            run.config.align, run.config.merge, run.config.narrow, refit, export
        )  # fmt: skip
        if variant == RECOVERED:
            assert run.config.recover is not None
            made.append(recovery.identity_of(run))
        inputs["variant"] = text_digest([made, [s.model_dump(mode="json") for s in sections]])
    return [
        EvaluateUnit(
            variant=variant,
            domain=domain,
            model=_model_folder(run, variant),
            needs_code=export is not None and FORMATS[export.format].needs_code,
            corpus=run.folder.evaluation_tokens,
            config=config,
            folder=run.folder.evaluation,
            inputs=tuple(sorted(inputs.items())),
            engine=engine,
        )
        for domain in domains
    ]


def _model_folder(run: Prepared, variant: str) -> Path:
    return run.moe.checkpoint.folder if variant == ORIGINAL else output_of(run, variant)


def output_of(run: Prepared, variant: str) -> Path:
    """The folder of a variant's checkpoint; what is trained gives its place to what comes of it."""
    trained = run.config.recover is not None and variant == MAIN
    return run.folder.unrecovered if trained else run.folder.output(variant)


def untrained_name(variant: str) -> str:
    """The variant that was decided; training changes values, no decision."""
    return MAIN if variant == RECOVERED else variant


def baselines(run: Prepared) -> list[Variant]:
    """The variants that exist only to be compared with."""
    return [variant for variant in run.variants if variant.name != MAIN]
