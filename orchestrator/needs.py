"""What method, merge and alignment need beyond routing sums: refused early, handed over late."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from models.moe import MoeCheckpoint
from models.remote.urls import is_url
from orchestrator import samples
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.run_folder import RunFolder
from stages.calibrate.statistics import LayerStatistics, read_statistics
from stages.corpus.read import local_files
from stages.group.config import AnyMethod, Need
from stages.group.provide import provide, subsample_sums
from stages.group.task import check_task
from stages.subsample.read import SubsampleStatistics


def needs(config: RunConfig, method: AnyMethod) -> frozenset[Need]:
    """What a method needs, and what merging with the run's weights does."""
    found: set[Need] = set(method.needs)
    if config.merge.weights == "alpha" and not method.prunes:
        found.add("subsample")
    if config.refit.enabled is True:
        found.add("inputs")
    return frozenset(found)


def check_needs(
    config: RunConfig, folder: RunFolder, moe: MoeCheckpoint, domains: Collection[str]
) -> None:
    """Refuses what the observation cannot give, before anything is observed.

    Args:
        domains: of the calibration text; not read where the statistics are another run's.

    Raises:
        ConfigError: a sample is needed and none will be taken.
        StatisticsError: the task names a domain that will not be observed.
    """
    if config.align.by != "weights":
        raise ConfigError(
            f"align.by={config.align.by} is not part of a run yet",
            "set align.by=weights",
        )
    if "subsample" in needs(config, config.group) and not _sampled(config, folder, moe):
        why = config.group.method if "subsample" in config.group.needs else "merge.weights=alpha"
        raise ConfigError(
            f"{why} needs the outputs of all experts on sampled tokens, and none are taken",
            "set calibrate.sample.tokens (4096) and calibrate.sample.statistics=true",
        )
    if "inputs" in needs(config, config.group) and not _inputs(config, folder, moe):
        what: str = config.group.method if config.group.needs else "refit.enabled=true"
        raise ConfigError(
            f"{what} needs a sample of what enters the layers, and none is taken",
            "set calibrate.sample.tokens (16384), or use a method that keeps whole experts",
        )
    _check_domains(config, domains)


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
        found = {
            layer: subsample_sums(SubsampleStatistics.read(path), config.group.task)
            for layer, path in samples.subsamples(folder, config.calibrate, moe).items()
        }
    return provide(wanted, statistics, moe, found)


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
