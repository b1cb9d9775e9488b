"""Hands a run to Slurm."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from models.atomic import write_bytes
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.run_folder import RunFolder
from orchestrator.slurm.config import SlurmConfig
from orchestrator.slurm.script import Places, log_option, refuse_secrets, render


@dataclass(frozen=True)
class Submission:
    """A script and the config that it runs; nothing is written yet."""

    folder: RunFolder
    config: RunConfig
    script: str

    @property
    def script_path(self) -> Path:
        """Where the script will lie."""
        return self.folder.slurm / "job.sbatch"

    def write(self) -> None:
        """Into the run folder."""
        self.folder.slurm.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        write_bytes(self.folder.slurm / "config.yaml", text.encode())
        write_bytes(self.script_path, self.script.encode())

    def submit(self) -> str:
        """The job's number.

        Raises:
            ConfigError: no sbatch here, or it refuses the job.
        """
        words = ["sbatch", "--parsable", log_option(self.folder.root), str(self.script_path)]
        remedy = f"mend `slurm`, or submit by hand: {shlex.join(words)}"
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ConfigError(f"sbatch cannot be run here: {error}", remedy) from error
        found = re.match(r"\d+", done.stdout)
        if done.returncode or not found:
            said = done.stderr.strip() or done.stdout.strip()
            raise ConfigError(f"Slurm refuses the job: {said}", remedy)
        return found[0]


def plan(config: RunConfig) -> Submission:
    """Renders the script.

    Raises:
        ConfigError: no `slurm` section, a hostile path, or a secret in the script.
    """
    slurm = config.slurm
    if slurm is None:
        raise ConfigError(
            "the config has no `slurm` section",
            "add one with cpus_per_task at least, or give slurm.cpus_per_task=N as an argument",
        )
    _check_fits(config, slurm)
    # Other paths stay as they are: the job starts in this folder, and they are part of the run.
    config = config.model_copy(update={"run_dir": config.run_dir.absolute()})
    folder = RunFolder(config.run_dir)
    places = Places(folder.root, Path.cwd(), folder.slurm / "config.yaml", sys.executable)
    script = render(slurm, places)
    refuse_secrets(script)
    return Submission(folder, config, script)


def _check_fits(config: RunConfig, slurm: SlurmConfig) -> None:
    wanted = config.executor.gpus_per_worker
    if wanted > slurm.gpus_per_node:
        raise ConfigError(
            f"a worker needs executor.gpus_per_worker={wanted} GPUs, a node has"
            f" slurm.gpus_per_node={slurm.gpus_per_node}",
            "raise slurm.gpus_per_node",
        )
