"""One seed: observe once, then build, open and measure every cell through the product's stages."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_control import write_random_layer
from benchmarks.quality_methods import METHODS, Cell
from models.atomic import write_json
from models.moe import MoeCheckpoint
from orchestrator import pipeline
from orchestrator.chain import written
from orchestrator.load import validate
from orchestrator.needs import attached
from orchestrator.preflight import Prepared, Variant, prepare
from orchestrator.run import observe
from orchestrator.run_folder import MAIN, RunFolder
from orchestrator.sizing import sized
from stages.calibrate.statistics import read_statistics
from stages.corpus.stage import block_domains, read_domain
from stages.evaluate import stage as evaluate
from stages.evaluate.stage import ORIGINAL, EvaluateUnit
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.export.layout import file_layouts, placeholder, router_groups, sizes
from stages.export.stage import assemble
from stages.group import stage as group
from stages.group.decision import LayerDecision
from stages.group.task import task_layers
from stages.model import load_model
from stages.probe.stage import Prober
from stages.unit import execute

LENGTH = 256  # tokens per block
PROMPT = 32  # tokens of a prompt


@dataclass(frozen=True)
class Setup:
    """Everything that a number depends on beside method, ratio, refit and seed."""

    model: Path
    calibration: Path  # parquet, or a folder of them; columns text, domain
    reported: Path
    tokens: int = 81_920  # observed
    sample: int = 4096  # of them, inputs that are kept: the default of calibrate.sample.tokens
    statistics: bool = True  # whether all experts run on the sample
    statistics_tokens: int = 32_768  # on so many of it at most
    evaluated: int = 10_240
    positions: int = 512  # per domain, at which KL is measured
    prompts: int = 4  # per domain
    continued: int = 16  # tokens

    def settings(self) -> dict[str, Any]:
        """For JSON: names of files, not where they lie."""
        return {k: v.name if isinstance(v, Path) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Observed:
    """A seed's observation, and the original measured on the reported text."""

    setup: Setup
    seed: int
    run: Prepared
    original: dict[str, Any]


def observe_seed(setup: Setup, seed: int, folder: Path) -> Observed:
    """What `coalesce calibrate` does, in this process; done already: read again."""
    torch.set_num_threads(1)
    run = prepare(validate(_config(setup, seed, folder)))
    statistics = observe(run)
    reuse = run.config.calibrate.model_copy(update={"statistics": statistics})
    run = replace(run, config=run.config.model_copy(update={"calibrate": reuse}))
    cached = folder / "original.json"
    # A folder that was copied without its run lacks what others are compared with.
    if not cached.exists() or not (run.folder.evaluation / ORIGINAL).exists():
        found = _measure(run, setup, ORIGINAL, run.moe.checkpoint.folder, False)
        whole = placeholder(run.moe, dict.fromkeys(run.moe.layers, run.moe.num_experts))
        write_json(cached, found | _sizes(run, whole, ExportConfig()))
    return Observed(setup, seed, run, json.loads(cached.read_text()))


def measure_cell(observed: Observed, cell: Cell) -> dict[str, Any]:
    """Numbers of one cell, from its file if it was measured before."""
    root = observed.run.folder.root
    cached = root.parent / "cells" / f"{cell.slug}.json"
    if not cached.exists():
        folder = root.parent / "work" / cell.slug
        shutil.rmtree(folder, ignore_errors=True)
        start, work = time.monotonic(), time.process_time()
        facts = _build(observed, cell, folder)
        # The second does not count what else ran on the machine.
        built = {
            "seconds": time.monotonic() - start,
            "cpu_seconds": time.process_time() - work + facts.pop("probe_seconds"),
        }
        recipe = METHODS[cell.method]
        code = FORMATS[recipe.format].needs_code
        numbers = _measure(observed.run, observed.setup, cell.slug, folder / "output", code)
        numbers["agreement"] = agreement(observed.original, numbers)
        del numbers["continuations"]
        shutil.rmtree(folder)
        shutil.rmtree(observed.run.folder.evaluation / cell.slug, ignore_errors=True)
        write_json(cached, asdict(cell) | {"seed": observed.seed} | built | facts | numbers)
    found: dict[str, Any] = json.loads(cached.read_text())
    return found


def _config(setup: Setup, seed: int, folder: Path) -> dict[str, Any]:
    """The config of the observation; everything that is not named has its default."""

    def data(path: Path, tokens: int, seed: int) -> dict[str, Any]:
        source = {"path": str(path), "domain_column": "domain"}
        return {"sources": [source], "tokens": tokens, "sequence_length": LENGTH, "seed": seed}

    return {
        "run_dir": folder / "run",
        "model": {"path": str(setup.model), "verify": "headers"},
        "calibrate": {
            "data": data(setup.calibration, setup.tokens, seed),
            "shards": 1,
            "batch_size": 16,
            "dtype": "float32",
            "sample": {
                "tokens": setup.sample,
                "seed": seed,
                "statistics": setup.statistics,
                "statistics_tokens": setup.statistics_tokens,
            },
        },
        "evaluate": {
            "data": data(setup.reported, setup.evaluated, 0),
            "baselines": [],
            "batch_size": 16,
            "dtype": "float32",
            "kl_positions": setup.positions,
        },
        "executor": {"kind": "local"},
    }


def _build(observed: Observed, cell: Cell, folder: Path) -> dict[str, Any]:
    """Decides, transforms every layer and assembles `folder/output`; without the reload gate, since
    the folder is opened here anyway."""
    recipe, base = METHODS[cell.method], observed.run
    update = recipe.sections | {
        "group": cell.group(observed.seed),
        "refit": cell.refit_section,
        "run_dir": folder,
    }
    config = validate(base.config.model_dump(mode="json") | update)
    config = sized(config, base.moe, base.folder).config
    variant = Variant(MAIN, config.group, ExportConfig.model_validate({"format": recipe.format}))
    run = replace(base, config=config, folder=RunFolder(folder), variants=(variant,))
    probe_seconds = _probe(run, base.folder.root.parent / "probe")
    decisions = _decide(run, variant)
    layouts = file_layouts(run.moe, decisions, variant.export)
    units = pipeline.transform_units(run, variant, decisions, layouts)
    here = _Here(observed.seed if recipe.control else None)
    units = written(run, variant, decisions, units, here)
    refitted = here.refitted
    (folder / "output").mkdir()
    assemble(pipeline.export_unit(run, variant, decisions, layouts, units), folder / "output")
    facts = {"format": recipe.format, "refitted_layers": refitted, "probe_seconds": probe_seconds}
    facts["widths"] = [each.width for each in decisions]
    return facts | _sizes(run, decisions, variant.export)


def _probe(run: Prepared, shared: Path) -> float:
    """Probes what the method divides its budget by, once per seed.

    Returns:
        CPU seconds that a probe of its own would have taken on top of what was spent here.
    """
    units, spent, prober = pipeline.probe_units(run), shared / "cpu_seconds.json", Prober()
    if not units:
        return 0.0
    start = time.process_time()
    for unit in units:
        execute(replace(unit, output=shared / unit.output.name), prober.run_one)
    used = time.process_time() - start
    if not spent.exists():
        write_json(spent, used)
    shutil.copytree(shared, run.folder.probe)
    return float(json.loads(spent.read_text())) - used


class _Here:
    """Runs units in this process and counts layers whose refit was made; see `chain.Schedule`."""

    def __init__(self, control: int | None) -> None:
        """`control`: the seed of random experts in place of the layers' own; None: their own."""
        self._control = control
        self.refitted = 0

    def __call__(
        self,
        stage: str,
        units: Sequence[Any],
        run_one: Callable[[Any], dict[str, Any]],
        memory_bytes: int,
    ) -> None:
        for unit in units:
            seed = self._control
            if seed is not None and stage == "transform" and unit.decision is not None:
                done = execute(unit, partial(write_random_layer, seed=seed))
            else:
                done = execute(unit, run_one)
            self.refitted += done.result.get("strength") is not None


def _decide(run: Prepared, variant: Variant) -> list[LayerDecision]:
    assert run.config.calibrate.statistics is not None
    statistics = task_layers(read_statistics(run.config.calibrate.statistics), None)
    statistics = attached(run.config, variant.method, statistics, run.folder, run.moe)
    groups = router_groups(run.moe, variant.export)
    decisions = group.decide(
        variant.method, statistics, sizes(run.moe, variant.export, variant.method.left), groups
    )
    FORMATS[variant.export.format].check(run.moe, decisions)
    return decisions


def _sizes(
    run: Prepared, decisions: Sequence[LayerDecision], export: ExportConfig
) -> dict[str, int]:
    layouts = file_layouts(run.moe, decisions, export)
    return {
        "expert_bytes": _expert_bytes(run, decisions),
        "bytes": sum(layout.file_bytes for layout in layouts),
        "flops_per_token": flops_per_token(run.moe, decisions, export.format),
    }


def _expert_bytes(run: Prepared, decisions: Sequence[LayerDecision]) -> int:
    total = 0
    for each in decisions:
        expert = run.moe.meta_expert(each.layer)
        size = sum(tensor.nbytes for tensor in expert.tensors().values())
        share = 1.0 if each.width is None else each.width / expert.neurons
        total += round(len(each.representatives) * size * share)
    return total


def flops_per_token(moe: MoeCheckpoint, decisions: Sequence[LayerDecision], form: str) -> int:
    """Two per weight that a token meets; attention scores, norms and the softmax are not counted.

    A token meets top-k experts, even where two of its ids lead to the same one.
    """
    infos, config = moe.checkpoint.tensors, moe.checkpoint.config
    names = [name for layer in (None, *moe.layers) for name in moe.dense_names(layer)]
    tied = bool(config.get("tie_word_embeddings", True))
    weights = 0
    for name in names:
        if len(infos[name].shape) > 1 and (tied or "embed" not in name):
            weights += math.prod(infos[name].shape)
    for each in decisions:
        kept, expert = len(each.representatives), moe.meta_expert(each.layer)
        share = 1.0 if each.width is None else each.width / expert.neurons
        used = min(moe.top_k, kept) if form == "native" else moe.top_k
        weights += round(used * share * sum(t.numel() for t in expert.tensors().values()))
        rows = kept if form == "native" else moe.num_experts
        weights += rows * moe.hidden_size
    return 2 * weights


def _measure(
    run: Prepared, setup: Setup, name: str, model: Path, needs_code: bool
) -> dict[str, Any]:
    """Perplexity and KL per domain by the evaluate stage, and greedy continuations."""
    assert run.config.evaluate is not None
    corpus, measurer = run.folder.evaluation_tokens, evaluate.Measurer()
    domains, results = block_domains(corpus), {}
    for domain in domains:
        unit = EvaluateUnit(
            name, domain, model, needs_code, corpus, run.config.evaluate, run.folder.evaluation, ()
        )
        results[domain] = measurer.run_one(unit)
    opened = load_model(model, "float32", trust_remote_code=needs_code)
    made = [
        _continued(opened, _prompts(corpus, domain, setup.prompts), setup) for domain in domains
    ]
    return evaluate.reduce(results) | {"continuations": torch.cat(made).tolist()}


def _prompts(corpus: Path, domain: str, count: int) -> Tensor:
    """[count, PROMPT] the beginnings of a domain's first blocks."""
    blocks = [each for each in read_domain(corpus, domain) if len(each.tokens) >= PROMPT]
    return torch.tensor([block.tokens[:PROMPT] for block in blocks[:count]])


@torch.inference_mode()
def _continued(model: Any, prompts: Tensor, setup: Setup) -> Tensor:
    """[count, continued] the most probable tokens, one after another."""
    made: Tensor = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=setup.continued,
        min_new_tokens=setup.continued,
        do_sample=False,
    )
    return made[:, PROMPT:]


def agreement(original: dict[str, Any], other: dict[str, Any]) -> float:
    """Share of the continued tokens before the first that differs."""
    first, second = (torch.tensor(each["continuations"]) for each in (original, other))
    return float((first == second).long().cumprod(dim=1).double().mean())
