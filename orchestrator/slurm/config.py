"""Config of a Slurm job: what is asked of Slurm, and how a node is made ready."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from stages.settings import Settings

# Names as Slurm has them; nothing in them means anything to a shell.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:@+=/-]*$")]
# What `coalesce` sets itself; a second value would break the job.
_OURS = (
    *("chdir", "cpus-per-task", "export", "gpus-per-node", "job-name", "mem", "nodes", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "error", "parsable", "requeue", "no-requeue"),
    *("partition", "account", "qos", "signal", "time", "array", "wrap"),
)
_SECRET = re.compile(r"\b\w*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)\w*\s*=", re.I)


def _one_line(text: str) -> str:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError("a line break or control character cannot stand in a batch script's line")
    return text


def _shell_line(text: str) -> str:
    if _SECRET.search(text):
        raise ValueError(
            "sets what looks like a secret, which would lie in the run folder; export it where you"
            " submit: the job inherits your environment"
        )
    if text.lstrip().startswith("#SBATCH"):
        raise ValueError("is an option for Slurm: write it under slurm.options")
    return text


def _option(text: str) -> str:
    found = re.match(r"--([a-z][a-z0-9-]*)(=|$)", text)
    if not found:
        raise ValueError("an option of sbatch is written --name or --name=value")
    if found[1] in _OURS:
        raise ValueError(f"--{found[1]} is set by coalesce itself; see the keys of `slurm`")
    return _shell_line(text)


def _quoted(value: object) -> object:
    if isinstance(value, int | float):
        raise ValueError("write it in quotes: YAML reads 1:30:00 as the number 5400")
    return value


Time = Annotated[
    str,
    StringConstraints(pattern=r"^(\d+-)?\d+(:\d{1,2}){0,2}$"),
    BeforeValidator(_quoted),
]
Line = Annotated[str, AfterValidator(_one_line), AfterValidator(_shell_line)]
Option = Annotated[str, AfterValidator(_one_line), AfterValidator(_option)]
Word = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]


class SlurmConfig(Settings):
    """One job: `nodes` nodes, one Ray worker node on each. Read by `coalesce submit slurm` only."""

    cpus_per_task: int = Field(gt=0)
    nodes: int = Field(default=1, gt=0)
    gpus_per_node: int = Field(default=0, ge=0)
    # As sbatch takes it: 64G. None: the partition's default. 0: all of the node.
    memory_per_node: Annotated[Name, BeforeValidator(str)] | None = None
    # Minutes, hours:minutes:seconds or days-hours. None: the partition's.
    time: Time | None = None
    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    job_name: Name = "coalesce"
    # Shell lines before anything else: `module load cuda`, `source venv/bin/activate`.
    setup: tuple[Line, ...] = ()
    # Words before Python on every node: [apptainer, exec, --nv, image.sif]. The image's own
    # `python` then runs; the launcher itself runs outside, where srun and scontrol are.
    container: tuple[Word, ...] = ()
    # More options of sbatch, one each: --constraint=a100.
    options: tuple[Option, ...] = ()
    # A batch script of your own instead of the built-in template (Jinja2).
    template: Path | None = None
    # How long before the time limit the run stops taking units.
    lead_seconds: int = Field(default=180, ge=10)
    # How long all nodes have to join.
    join_seconds: int = Field(default=600, gt=0)
    # Network interface of the cluster: ib0. None: the address by which Slurm reaches the node.
    interface: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:@-]{1,15}$")] | None = None
    # Node-local folder for Ray's sockets and logs; short, since a socket's path has 107 letters.
    scratch: Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9_./-]{0,47}$")] = "/tmp"
    # Starts in a row that finish no unit before the job gives up.
    fruitless_starts: int = Field(default=3, gt=0)
