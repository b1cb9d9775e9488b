"""Everything that can be known to be wrong is refused here, before a byte is written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from models.errors import CheckpointError, DiskFull
from models.moe import MoeCheckpoint
from models.skeleton import check_dense_tensors
from orchestrator import run_folder
from orchestrator.config import ModelConfig, RunConfig
from orchestrator.run_folder import MAIN, RunFolder
from stages.calibrate.statistics import layers_of, metadata_of, read_statistics
from stages.corpus.config import CorpusConfig
from stages.corpus.read import check_source
from stages.errors import BudgetError, DataError, StatisticsError
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.export.layout import FileLayout, file_layouts, placeholder, sizes
from stages.group.budget import total_experts, uniform
from stages.group.config import METHODS, AnyMethod, Budget, Frequency, McSmoe, Reap
from stages.group.decision import LayerDecision
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


def prepare(config: RunConfig) -> Prepared:
    """Opens the model, looks at data, budget, statistics and disk; writes nothing.

    Raises:
        UserError: with cause, numbers and remedy.
    """
    moe = MoeCheckpoint.open(resolve_model(config.model), allow_links=config.model.allow_links)
    check_dense_tensors(moe)
    for data in _corpora(config):
        for source in data.sources:
            check_source(source)
    model, folder = identity(moe.checkpoint), RunFolder(config.run_dir.absolute())
    if config.calibrate.statistics is not None:
        check_statistics(config.calibrate.statistics, moe, model)
    found = _variants(config, moe)
    for variant in found:
        expected_decisions(variant, moe)
    resumes = run_folder.check(folder, config, model)
    tokenizer = config.model.tokenizer or moe.checkpoint.folder
    if not any((tokenizer / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise DataError(f"{tokenizer} holds no tokenizer", "set `model.tokenizer`")
    prepared = Prepared(config, folder, moe, model, tokenizer.absolute(), found, resumes)
    _check_disk(prepared)
    return prepared


def resolve_model(config: ModelConfig) -> Path:
    """The local folder of a model; a hub name is downloaded (weights, config, tokenizer only).

    Raises:
        CheckpointError: neither a folder nor a name that can be downloaded.
    """
    path = Path(config.path).expanduser()
    if path.exists():
        return path.absolute()
    if config.path.startswith((".", "/", "~")) or config.path.count("/") != 1:
        raise CheckpointError(f"no checkpoint folder at {path}", "correct `model.path`")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt"]
        found = snapshot_download(config.path, revision=config.revision, allow_patterns=patterns)
    except Exception as error:  # the hub's client has dozens of types; all mean: not to be had
        raise CheckpointError(
            f"{config.path} is no local folder and cannot be downloaded:"
            f" {str(error).splitlines()[0]}",
            "download it where there is a network and set `model.path` to the folder",
        ) from error
    return Path(found)


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
    merged = [layer for layer in moe.layers if layer not in method.skip_layers]
    if not merged:
        return placeholder(moe, dict.fromkeys(moe.layers, moe.num_experts))
    total = total_experts(method.budget, len(merged), moe.num_experts, sizes(moe, variant.export))
    kept = uniform(total, merged, moe.num_experts)
    spare = total - sum(kept.values()) if isinstance(method, McSmoe) else 0
    adaptive = isinstance(method, McSmoe) and method.scope == "global"
    if adaptive and variant.export.format == "native":
        raise BudgetError(
            "group.scope=global gives every layer its own number of experts, which the native"
            " format cannot hold",
            "use group.scope=uniform, or export.format=mapped",
        )
    if adaptive:
        kept = {layer: n + (i < spare) for i, (layer, n) in enumerate(kept.items())}
    kept |= dict.fromkeys(method.skip_layers, moe.num_experts)
    decisions = placeholder(moe, kept)
    form.check(moe, decisions)
    return decisions


def expected_layouts(variant: Variant, moe: MoeCheckpoint) -> list[FileLayout]:
    """Output files before anything is decided; exact for a uniform budget."""
    return file_layouts(moe, expected_decisions(variant, moe), variant.export)


def check_statistics(path: Path, moe: MoeCheckpoint, model: str) -> None:
    """Refuses statistics that were observed on another model.

    Raises:
        StatisticsError: with both fingerprints or dimensions.
    """
    table = read_statistics(path)
    seen = metadata_of(table).get("model", "none")
    if seen != model:
        raise StatisticsError(
            f"{path} was observed on another model (fingerprint {seen[:12]}, this model's is"
            f" {model[:12]})",
            "calibrate on this model, or correct `model.path`",
        )
    layers = [each.layer for each in layers_of(table)]
    if layers != list(moe.layers):
        raise StatisticsError(f"{path} covers layers {layers}, the model has {list(moe.layers)}")


def disk_bytes(prepared: Prepared) -> int:
    """What the run writes at its peak: every variant's files, distributions and blocks."""
    files = sum(
        layout.file_bytes
        for variant in prepared.variants
        for layout in expected_layouts(variant, prepared.moe)
    )
    evaluate = prepared.config.evaluate
    if evaluate is None:
        return files
    vocabulary = int(prepared.moe.checkpoint.config["vocab_size"])
    domains = len(evaluate.data.sources)
    return files + domains * evaluate.kl_positions * vocabulary * 4 + evaluate.data.tokens * 4


def _variants(config: RunConfig, moe: MoeCheckpoint) -> tuple[Variant, ...]:
    main = Variant(MAIN, config.group, config.export)
    names = config.evaluate.baselines if config.evaluate is not None else ()
    budget = Budget(experts_per_layer=_baseline_experts(main, moe))
    return (main, *(Variant(name, _pruning(name, budget), ExportConfig()) for name in names))


def _pruning(name: str, budget: Budget) -> Frequency | Reap:
    made = METHODS[name](budget=budget)
    assert isinstance(made, Frequency | Reap)
    return made


def _baseline_experts(main: Variant, moe: MoeCheckpoint) -> int:
    """Experts per layer that cost at least the bytes of the main variant: no unfair baseline."""
    decisions = expected_decisions(main, moe)
    total = sum(len(decision.representatives) for decision in decisions)
    return max(-(-total // len(decisions)), moe.top_k)


def _corpora(config: RunConfig) -> list[CorpusConfig]:
    found = [] if config.calibrate.statistics is not None else [config.calibrate.data]
    return found + ([config.evaluate.data] if config.evaluate is not None else [])


def _check_disk(prepared: Prepared) -> None:
    existing = prepared.folder.root
    while not existing.exists():
        existing = existing.parent
    needed, free = disk_bytes(prepared), shutil.disk_usage(existing).free
    if needed > free and not prepared.resumes:
        raise DiskFull(
            f"the run will write {needed:,} bytes to {prepared.folder.root}, {free:,} are free",
            "free space, move `run_dir`, or drop baselines with evaluate.baselines=[]",
        )
