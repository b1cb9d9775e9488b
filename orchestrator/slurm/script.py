"""The batch script of a run. Pure: from a config and paths to text."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from orchestrator.errors import ConfigError
from orchestrator.slurm.config import SlurmConfig

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY", re.IGNORECASE)
# Shorter values stand in a script by chance.
_SECRET_LETTERS = 8


@dataclass(frozen=True)
class Places:
    """Where the job works: everything absolute, and the same on all nodes."""

    run: Path
    folder: Path
    config: Path
    python: str = sys.executable

    def check(self) -> None:
        """Refuses paths that no batch script can hold.

        Raises:
            ConfigError: control characters or a backslash.
        """
        for path in (self.run, self.folder, self.config, Path(self.python)):
            if any(ord(letter) < 32 or letter in "\x7f\\" for letter in str(path)):
                raise ConfigError(
                    f"{str(path)!r} holds a line break, control character or backslash",
                    "choose another folder: Slurm's options cannot name it",
                )


def render(config: SlurmConfig, places: Places) -> str:
    """The script.

    Raises:
        ConfigError: a path that no script can hold, or a template that cannot be filled in.
    """
    places.check()
    environment = Environment(
        loader=PackageLoader("orchestrator.slurm"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"quote": shlex.quote, "words": shlex.join}
    python = [*config.container, "python"] if config.container else [places.python]
    driver = [*python, "-m", "orchestrator", "run", str(places.config)]
    try:
        if config.template is None:
            template = environment.get_template("job.sbatch.j2")
        else:
            template = environment.from_string(config.template.read_text())
        return template.render(
            options=options(config),
            folder=str(places.folder),
            setup=config.setup,
            launcher=[places.python, "-m", "cluster.slurm.launch"],
            arguments=_arguments(config, places, python),
            driver=[*driver, "executor.kind=ray", "executor.address=auto"],
        )
    except (TemplateError, TypeError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"slurm.template cannot be filled in: {error}") from error


def options(config: SlurmConfig) -> list[str]:
    """The options of sbatch, as they stand behind `#SBATCH`.

    Names and numbers only: how sbatch reads quotes there is its own affair, so paths are left to
    its command line.
    """
    wanted = {
        "job-name": config.job_name,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": config.cpus_per_task,
        "gpus-per-node": config.gpus_per_node or None,
        "mem": config.memory_per_node,
        "time": config.time,
        "signal": f"B:USR1@{config.lead_seconds}",
        "open-mode": "append",
    }
    found = [f"--{name}={value}" for name, value in wanted.items() if value is not None]
    return [*found, "--requeue", *config.options]


def log_option(run: Path) -> str:
    """The option of sbatch that names the job's log; `%` begins a pattern there."""
    return "--output=" + str(run / "slurm").replace("%", "%%") + "/job-%j.log"


def refuse_secrets(text: str, environ: Mapping[str, str] | None = None) -> None:
    """Refuses a script that holds the value of a secret of the environment.

    Raises:
        ConfigError: names the variable, not its value.
    """
    for name, value in (os.environ if environ is None else environ).items():
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_LETTERS and value in text:
            raise ConfigError(
                f"the batch script would hold the value of {name}",
                "leave it in the environment: the job inherits it from where you submit",
            )


def _arguments(config: SlurmConfig, places: Places, python: Sequence[str]) -> list[str]:
    found = ["--run", str(places.run), "--python", shlex.join(python)]
    found += ["--scratch", config.scratch, "--join-seconds", str(config.join_seconds)]
    found += ["--lead-seconds", str(config.lead_seconds)]
    found += ["--fruitless-starts", str(config.fruitless_starts)]
    return found + (["--interface", config.interface] if config.interface else [])
