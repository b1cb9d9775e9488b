"""What method, merge and alignment need beyond routing sums: refused early, handed over late."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from models.moe import MoeCheckpoint
from models.remote.urls import is_url
from orchestrator import samples
from orchestrator.config import RunConfig
from orchestrator.curves import with_curves
from orchestrator.errors import ConfigError
from orchestrator.predictions import sampled_sums
from orchestrator.run_folder import RunFolder
from stages.calibrate.statistics import LayerStatistics, read_statistics
from stages.corpus.read import local_files
from stages.export.router import check_router
from stages.group.config import AnyMethod, Coalesce, McSmoe, Need
from stages.group.provide import provide
from stages.group.task import check_task


def needs(config: RunConfig, method: AnyMethod) -> frozenset[Need]:
    """What a method needs, and what merging with the run's weights does."""
    found: set[Need] = set(method.needs)
    if config.merge.weights == "alpha" and not method.prunes:
        found.add("subsample")
    if isinstance(method, Coalesce) and method.divide != "uniform":
        found.add("probe" if method.divide == "probe" else "subsample")
    if method.left is not None:
        found.add("subsample")
    if isinstance(method, Coalesce | McSmoe) and method.weigh_layers == "gain":
        found.add("gain")
    if config.refit.enabled is True or _merges_by_sample(config, method):
        found.add("inputs")
    if config.compress is not None and config.compress.needs_inputs:
        found.add("inputs")
    return frozenset(found)


def _merges_by_sample(config: RunConfig, method: AnyMethod) -> bool:
    """Whether merging or router rows look at the sample; not where nothing is merged."""
    wanted = config.align.watches or config.merge.by == "neurons"
    wanted = wanted or config.export.router == "least_squares"
    return wanted and not method.prunes and not method.narrows


def check_needs(
    config: RunConfig, folder: RunFolder, moe: MoeCheckpoint, domains: Collection[str]
) -> None:
    """Refuses what the observation cannot give, before anything is observed.

    Args:
        domains: of the calibration text; not read where the statistics are another run's.

    Raises:
        ConfigError: a sample is needed and none will be taken, or a router cannot be fitted.
        StatisticsError: the task names a domain that will not be observed.
    """
    check_router(config.export, moe)
    if "subsample" in needs(config, config.group) and not _sampled(config, folder, moe):
        why: str = config.group.method if "subsample" in config.group.needs else ""
        divided = isinstance(config.group, Coalesce) and config.group.divide == "predicted"
        why = why or ("group.experts" if config.group.left is not None else "")
        why = why or ("group.divide=predicted" if divided else "merge.weights=alpha")
        raise ConfigError(
            f"{why} needs the outputs of all experts on sampled tokens, and none are taken",
            "set calibrate.sample.tokens (4096) and calibrate.sample.statistics=true",
        )
    if "inputs" in needs(config, config.group) and not _inputs(config, folder, moe):
        what, remedy = _asks_for_inputs(config)
        raise ConfigError(
            f"{what} needs a sample of what enters the layers, and none is taken",
            f"set calibrate.sample.tokens (16384), or {remedy}",
        )
    observing = samples.observed(folder, config.calibrate)
    theirs = observing.root != folder.root and not observing.calibration_tokens.exists()
    if theirs and "probe" in needs(config, config.group):
        raise ConfigError(
            f"group.divide=probe runs the model on calibration text, and"
            f" {observing.calibration_tokens} is missing",
            "copy it from the run that observed, or use group.divide=predicted",
        )
    _check_domains(config, domains)


def _asks_for_inputs(config: RunConfig) -> tuple[str, str]:
    """What cannot do without sampled inputs, and what can instead."""
    if "inputs" in config.group.needs:
        return config.group.method, "use a method that keeps whole experts"
    if config.refit.enabled is True:
        return "refit.enabled=true", "refit.enabled=auto"
    if config.align.watches:
        return f"align.by={config.align.by}", "align.by=weights"
    if config.merge.by == "neurons":
        return "merge.by=neurons", "merge.by=weights"
    if config.export.router == "least_squares":
        return "export.router=least_squares", "export.router=mean"
    return "compress", "compress.importance=weights and compress.whiten=false"


def attached(
    config: RunConfig,
    method: AnyMethod,
    statistics: Sequence[LayerStatistics],
    folder: RunFolder,
    moe: MoeCheckpoint,
) -> list[LayerStatistics]:
    """The statistics with everything that this method decides by."""
    wanted = needs(config, method)
    found = {}
    if "subsample" in wanted:
        found = sampled_sums(config, config.group.task, folder, moe)
    provided = provide(wanted, statistics, moe, found)
    return with_curves(method, provided, found, folder, moe)


def _sampled(config: RunConfig, folder: RunFolder, moe: MoeCheckpoint) -> bool:
    if config.calibrate.statistics is None:
        return samples.evaluated(config.calibrate, moe)
    return bool(samples.subsamples(folder, config.calibrate, moe))


def _inputs(config: RunConfig, folder: RunFolder, moe: MoeCheckpoint) -> bool:
    if config.calibrate.statistics is None:
        return samples.sampled_tokens(config.calibrate, moe) > 0
    return bool(samples.layer_inputs(folder, config.calibrate, moe))


def _check_domains(config: RunConfig, domains: Collection[str]) -> None:
    task, calibrate = config.group.task, config.calibrate
    if task is None:
        return
    if calibrate.statistics is not None:
        table = read_statistics(calibrate.statistics)
        check_task(task, table["domain"].unique().to_pylist())
    elif all(is_url(source.path) or local_files(source) for source in calibrate.data.sources):
        # A data set on the hub shows its domains only when it is read.
        check_task(task, domains)
