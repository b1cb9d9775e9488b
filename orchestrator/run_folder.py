"""Every path of a run, and the claim that a folder belongs to this run and no other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from models.atomic import write_bytes, write_json
from orchestrator.config import RunConfig
from orchestrator.errors import RunFolderError
from stages.unit import differences

_PACKAGES = ("coalesce-moe", "torch", "transformers", "ray", "safetensors", "pyarrow", "datasets")
MAIN = "compressed"
# The main variant after it was trained; only there where the run has a section `recover`.
RECOVERED = "recovered"


@dataclass(frozen=True)
class RunFolder:
    """Names of files; nothing else joins strings to paths."""

    root: Path

    @property
    def identity(self) -> Path:
        """What this run is: model, config, versions, command."""
        return self.root / "run.json"

    @property
    def config(self) -> Path:
        """The resolved config, for people and for `coalesce run`."""
        return self.root / "config.yaml"

    @property
    def events(self) -> Path:
        """One JSON line per state change."""
        return self.root / "events.jsonl"

    @property
    def lock(self) -> Path:
        """Held while a process works on the run; says which one."""
        return self.root / "run.lock"

    @property
    def verify(self) -> Path:
        """Markers of checked weight files."""
        return self.root / "verify"

    @property
    def calibration_tokens(self) -> Path:
        """Token blocks that are observed."""
        return self.root / "calibration" / "tokens.arrow"

    @property
    def shards(self) -> Path:
        """Statistics shards."""
        return self.root / "calibration" / "shards"

    @property
    def inputs(self) -> Path:
        """Sampled inputs, one file per layer."""
        return self.root / "calibration" / "inputs"

    @property
    def subsample(self) -> Path:
        """Sums of all experts on the sampled inputs, one file per layer."""
        return self.root / "calibration" / "subsample"

    @property
    def refit(self) -> Path:
        """Streams and targets between blocks of layers, while they are refitted."""
        return self.root / "refit"

    @property
    def probe(self) -> Path:
        """What each size costs each layer alone, one file per layer."""
        return self.root / "probe"

    @property
    def threshold(self) -> Path:
        """What the rows of S are worth, one file per layer."""
        return self.root / "threshold"

    @property
    def kept_rows(self) -> Path:
        """Rows of S of every layer and matrix, where one threshold decides."""
        return self.root / "threshold.arrow"

    @property
    def statistics(self) -> Path:
        """The sum over shards."""
        return self.root / "statistics.arrow"

    @property
    def evaluation(self) -> Path:
        """Held-out tokens and what was measured on them."""
        return self.root / "evaluation"

    @property
    def evaluation_tokens(self) -> Path:
        """Token blocks that are measured."""
        return self.evaluation / "tokens.arrow"

    @property
    def logs(self) -> Path:
        """One folder per stage, one file per unit."""
        return self.root / "logs"

    @property
    def slurm(self) -> Path:
        """Batch script, config and logs of the Slurm jobs that work on this run."""
        return self.root / "slurm"

    @property
    def fetched(self) -> Path:
        """Text, and what is small of a checkpoint, from behind URLs; without a cache its weights
        too."""
        return self.root / "fetched"

    @property
    def upload(self) -> Path:
        """Markers of files that were sent, by target."""
        return self.root / "upload"

    @property
    def recover(self) -> Path:
        """Text, states and course of the training."""
        return self.root / "recover"

    @property
    def recover_tokens(self) -> Path:
        """Token blocks that are trained on."""
        return self.recover / "tokens.arrow"

    @property
    def taught(self) -> Path:
        """What the original says along them, while it is needed."""
        return self.recover / "teacher"

    @property
    def start(self) -> Path:
        """Layers with all rows of S, and the student that is made of them while it is trained."""
        return self.recover / "start"

    @property
    def unrecovered(self) -> Path:
        """The checkpoint before it was trained, where it was."""
        return self.root / "unrecovered"

    @property
    def report(self) -> Path:
        """index.html, report.json, pictures."""
        return self.root / "report"

    @property
    def sweep(self) -> Path:
        """Folder of the points that were built; sweep.json and pictures lie beside it."""
        return self.root / "sweep"

    def variant(self, name: str) -> Path:
        """Folder of the compressed model or of a pruning baseline."""
        return self.root if name in (MAIN, RECOVERED) else self.root / "baselines" / name

    def decision(self, variant: str) -> Path:
        """Decision table."""
        return self.variant(variant) / "decision.arrow"

    def layers(self, variant: str) -> Path:
        """Finished layer files."""
        if variant == RECOVERED:
            return self.recover / "layers"
        return self.variant(variant) / "layers"

    def output(self, variant: str) -> Path:
        """The checkpoint; that of the main variant is what the run is for, trained or not."""
        return self.variant(variant) / "output"


def claim(folder: RunFolder, config: RunConfig, model: str) -> None:
    """Takes a new or our own folder for this run.

    Raises:
        RunFolderError: something else is in it, or a run of another model or config.
    """
    wanted = {"model": model, "config": settled(config)}
    found = _read_identity(folder)
    if found is not None:
        refuse_changed(folder, found, wanted)
        return
    folder.root.mkdir(parents=True, exist_ok=True)
    write_bytes(folder.config, yaml.safe_dump(config.model_dump(mode="json")).encode())
    write_json(
        folder.identity,
        wanted | {"schema": 1, "versions": versions(), "command": " ".join(sys.argv)},
    )


def check(folder: RunFolder, config: RunConfig, model: str) -> bool:
    """`claim` without writing; True when the folder already holds this run."""
    found = _read_identity(folder)
    if found is not None:
        refuse_changed(folder, found, {"model": model, "config": settled(config)})
    existing = next(path for path in (folder.root, *folder.root.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RunFolderError(f"nothing can be written to {existing}", "choose another `run_dir`")
    return found is not None


def refuse_foreign(folder: RunFolder) -> None:
    """Asked before anything is fetched into a folder.

    Raises:
        RunFolderError: something else is in it.
    """
    _read_identity(folder)


def settled(config: RunConfig) -> dict[str, Any]:
    """The part of a config that decides results; where and how fast units run is not in it."""
    # Whether sums are made from the sample changes neither the sample nor anything else.
    free_here: dict[str, Any] = {"engine": True, "memory_bytes": True, "backend": True}
    free_here |= {"min_tokens_per_expert": True, "sample": {"statistics"}}
    free: dict[str, Any] = {"run_dir": True, "executor": True, "slurm": True, "sweep": True}
    free |= {"cache": True, "upload": True}
    free["calibrate"] = free_here
    if getattr(config.group, "divide", None) != "probe":
        free["probe"] = True
    values: dict[str, Any] = config.model_dump(mode="json", exclude=free)
    values["calibrate"] |= autoep(config)
    if config.recover is None:
        del values["recover"]  # as in runs that know no such section
    else:
        values["recover"] = config.recover.arithmetic
    return values | {"threads_per_unit": config.executor.threads_per_unit}


def autoep(config: RunConfig) -> dict[str, str]:
    """AutoEP has an arithmetic of its own, in which the number of ranks shows; others have not."""
    if config.calibrate.backend == "thin":
        return {}
    return {"backend": f"autoep-{config.executor.ranks_per_replica}"}


def refuse_changed(folder: RunFolder, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Nothing is resumed silently across a change."""
    parts = {key: found.get(key) for key in wanted}
    if parts != dict(wanted):
        raise RunFolderError(
            f"{folder.root} holds a run of other inputs: {differences(parts, dict(wanted))}",
            "choose another `run_dir`; `calibrate.statistics=OTHER_RUN/statistics.arrow` reuses"
            " what was observed",
        )


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _read_identity(folder: RunFolder) -> dict[str, Any] | None:
    if not folder.root.exists():
        return None
    if not folder.root.is_dir():
        raise RunFolderError(f"{folder.root} is not a folder", "choose another `run_dir`")
    try:
        return dict(json.loads(folder.identity.read_text()))
    except FileNotFoundError:
        # A run that was killed while it claimed the folder leaves config.yaml at most.
        foreign = sorted(p.name for p in folder.root.iterdir() if p.name not in _own_names(folder))
        if foreign:
            raise RunFolderError(
                f"{folder.root} is not empty and holds no run: {', '.join(foreign[:4])}",
                "choose another `run_dir`; nothing was changed",
            ) from None
        return None
    except (ValueError, TypeError) as error:
        raise RunFolderError(
            f"{folder.identity} is damaged: {error}", "choose another `run_dir`"
        ) from error


def _own_names(folder: RunFolder) -> set[str]:
    temporary = {path.name for path in folder.root.glob(".*.tmp")}
    own = {folder.config.name, folder.events.name, folder.lock.name, folder.slurm.name}
    own |= {folder.fetched.name, folder.upload.name}
    return own | temporary
